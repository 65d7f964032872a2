"""Measure a prior on held-out images: autoencoder PSNR, orientation, denoising error.

    python tools/measure_prior.py assets/cats64 --images afhq_cat_64.npz --split test [--record]

``--record`` writes the figures into the prior's ``config.json``, under ``figures``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

from particledaps.checks import DataError
from particledaps.data.image_set import to_tensor
from particledaps.data.npz_images import npz_split
from particledaps.priors.embedded import CONFIG, load_embedded, read_config
from particledaps.priors.errors import PriorError
from particledaps.training.export import prior_figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a prior on held-out images.")
    parser.add_argument("folder", type=Path, help="folder of the prior")
    parser.add_argument("--images", type=Path, required=True, help=".npz with test_images or train_images")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--record", action="store_true", help="write the figures into config.json")
    arguments = parser.parse_args()
    try:
        prior = load_embedded(arguments.folder)
        images = to_tensor(npz_split(arguments.images, arguments.split))
    except (PriorError, DataError) as error:
        sys.exit(f"measure_prior.py: {error}")
    figures = prior_figures(prior, images)
    print(json.dumps(figures, indent=1))
    if arguments.record:
        config = read_config(arguments.folder)
        config.setdefault("figures", {})[arguments.split] = figures
        (arguments.folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
