"""The device of a run."""

import torch

from runs.checks import SettingsError
from runs.settings import RunSettings

DEVICES = ("auto", "cpu", "cuda")


def choose_device(settings: RunSettings) -> torch.device:
    """The device that ``device``, ``gpu`` and ``use_tpu`` ask for.

    Raises:
        SettingsError: that device is not there.
    """
    if settings.use_tpu:
        try:
            import torch_xla
        except ImportError as error:
            raise SettingsError(
                "use_tpu=true: needs the package torch_xla on a TPU machine (pip install torch_xla); "
                "use device=cpu or device=cuda here"
            ) from error
        return torch_xla.device()
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingsError("device=cuda: torch sees no CUDA device; use device=cpu or device=auto")
    if settings.gpu >= torch.cuda.device_count():
        raise SettingsError(f"gpu={settings.gpu}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", settings.gpu)
