"""Reconstruct images from measurements with a diffusion prior.

Without arguments this is the demo: phase retrieval of a photograph and of synthetic cats on the embedded prior.

    python posterior_sample.py                                        # the demo
    python posterior_sample.py data=folder data.dir=MY_IMAGES name=mine sampler=latent_daps_hmc
    python posterior_sample.py --help
"""

from __future__ import annotations

from particledaps.settings.start_up import begin, exit_stopped, loading

PROGRAM = "posterior_sample.py"
if __name__ == "__main__":
    begin(PROGRAM)

import hydra  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from particledaps.checks import DataError, SettingsError  # noqa: E402
from particledaps.priors.errors import PriorError  # noqa: E402
from particledaps.runs.finished import finished_before  # noqa: E402
from particledaps.settings.command_line import CONFIG_DIR, fail, member, register, run  # noqa: E402
from particledaps.settings.family import followed_config  # noqa: E402
from particledaps.settings.statuses import DISK, FAILED, NOTHING, SKIPPED, StoppedError, disk_fault  # noqa: E402
from run_settings import RunSettings, follow_family, is_to_be_measured, validate, with_preset  # noqa: E402

register("run_settings", RunSettings)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
@member(PROGRAM)
def main(config: DictConfig) -> None:
    """Compose, check, run; errors end in one sentence and a non-zero status."""
    try:
        missing = reconstruct(OmegaConf.to_object(config), OmegaConf.to_container(config, resolve=True))
    except (SettingsError, DataError, PriorError) as error:
        fail(PROGRAM, str(error))
    except OSError as error:
        fail(PROGRAM, f"{disk_fault(error)}; finished images are kept, the same command goes on", DISK)
    except StoppedError as error:
        fail(PROGRAM, f"{error}; finished images are kept", FAILED)
    except KeyboardInterrupt as stop:
        exit_stopped(PROGRAM, stop, "finished images are kept, the same command goes on")
    if missing:
        fail(PROGRAM, *verdict(missing))


def reconstruct(settings: RunSettings, config: dict) -> dict[int, tuple[str, str]]:
    """State and error of each image without an answer, once everything that is asked for was done.

    What a run needs is imported only where something is left to do: torch and diffusers take seconds.
    """
    found, missing = with_preset(settings), None
    validate(found)
    own = follow_family(found)
    told = own.data.measurement is None and not is_to_be_measured(settings)
    if told and own.device != "cuda" and not own.use_tpu:
        missing = finished_before(own.data, own.save_dir, own.name, followed_config(config, own.model, own.sampler))
    if missing is None:
        with loading():
            from session import sample

        missing = sample(settings, config)
    return missing


def verdict(missing: dict[int, tuple[str, str]]) -> tuple[str, int]:
    """A sentence on the images without an answer, and the exit status; the gravest kind speaks."""

    def ids(state: str) -> str:
        return ", ".join(str(i) for i, (found, _) in missing.items() if found == state)

    if failed := ids("failed"):
        return f"image {failed} failed (metrics.json, status, says why); the same command tries again", FAILED
    if nothing := ids("diverged"):
        reason = next(text for state, text in missing.values() if state == "diverged")
        return f"nothing came out of image {nothing}: {reason}", NOTHING
    return f"image {ids('skipped')} was left out: its input cannot be read (metrics.json, status, says why)", SKIPPED


if __name__ == "__main__":
    run(PROGRAM, "config", main)
