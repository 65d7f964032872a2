"""torch is loaded when it is first used."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "from particledaps.settings.lazy_torch import LazyModule, load_torch_when_used as begin; begin(); import sys; "


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argument", ["--help", "num_samples=0", "model.path=''"])
def test_help_and_refusals_do_without_it(argument):
    ended = python("-X", "importtime", "posterior_sample.py", argument)
    assert ended.returncode == (0 if argument == "--help" else 2)
    assert "hydra" in ended.stderr and "torch._C" not in ended.stderr


@pytest.mark.parametrize(
    "use",
    [
        "import torch; print(torch.ones(2).sum().item())",
        "import torch.nn.functional as F, torch; print(F.relu(torch.ones(2)).sum().item())",
        "from torch import nn, ones; print(ones(2).sum().item())",
        "from torch.nn import functional as F; import torch; print(F.relu(torch.ones(2)).sum().item())",
        "from torch.fft import fft2; import torch; print(fft2(torch.ones(1, 2)).real.sum().item())",
        "import diffusers.utils, torch; print(torch.ones(2).sum().item())",
    ],
)
def test_any_first_use_loads_all_of_it(use):
    ended = python("-c", f"{BEGIN}import torch; assert type(sys.modules['torch']) is LazyModule; {use}")
    assert ended.stdout == "2.0\n", ended.stderr


def test_a_module_that_cannot_be_loaded_is_not_taken_for_one(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no libc10')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {BEGIN}import torch\n"
    code += "for _ in range(2):\n    try:\n        import torch; torch.ones\n"
    code += "    except ImportError as error:\n        print(error)"
    assert python("-c", code).stdout == "no libc10\nno libc10\n"


def test_without_torch_its_import_says_so():
    code = "import sys, importlib.util; importlib.util.find_spec = lambda name: None\n"
    code += f"{BEGIN}print('torch' in sys.modules)"
    assert python("-c", code).stdout == "False\n"


@pytest.mark.parametrize("first", ["torch.nn", "torch.nn.modules.linear", "torch.utils.data", "torch.fft"])
def test_nothing_of_it_is_loaded_twice(first):
    code = f"{BEGIN}import {first} as first; from torch.nn import Linear; import torch, gc\n"
    code += f"assert sys.modules['{first}'] is first and first.__spec__.name == '{first}' and first.__spec__.origin\n"
    code += "assert torch.nn.Linear is Linear is torch.nn.modules.linear.Linear\n"
    code += "modules = [c for c in torch.nn.Module.mro()[-1].__subclasses__() if c.__qualname__ == 'Module']\n"
    code += "print(len([c for c in modules if c.__module__ == 'torch.nn.modules.module']))\n"
    ended = python("-c", code)
    assert ended.stdout == "1\n", ended.stderr


def test_a_module_can_be_reloaded_afterwards():
    code = f"{BEGIN}import torch.fft, importlib; before = list(sys.meta_path)\n"
    code += "import colorsys; importlib.reload(colorsys); print(before[0].__class__.__name__)"
    assert python("-c", code).stdout not in ("", "LoadedMeanwhile\n")
