"""Train a small classifier of an ``.npz`` of labelled images, to judge priors of them.

    python tools/train_classifier.py fashion_mnist_28.npz --name fashion --padding 2 --out assets/fashion_classifier

The last ``--validation`` training images are left out; the accuracy is that of the test images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from particledaps.checks import DataError  # noqa: E402
from particledaps.data.image_set import to_tensor  # noqa: E402
from particledaps.data.labels import npz_labels, split_labels  # noqa: E402
from particledaps.data.npz_images import npz_split, npz_training  # noqa: E402
from particledaps.evaluation.classifier import load_classifier, save_classifier, train_classifier  # noqa: E402


def main() -> None:
    """Read, train, write, measure what was written."""
    parser = argparse.ArgumentParser(prog="train_classifier.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("images", type=Path, help=".npz with train_images, train_labels, test_images, test_labels")
    parser.add_argument("--name", required=True, help="of the data set: distances are called fd_NAME, kid_NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--padding", type=int, default=0, help="black pixels added on each side")
    parser.add_argument("--validation", type=int, default=5000, help="training images that are left out, the last ones")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--source", default="not stated", help="for the card: which images, under which terms")
    asked = parser.parse_args()
    try:
        run(asked)
    except (DataError, ValueError) as error:
        raise SystemExit(f"train_classifier.py: {error}") from None


def run(asked: argparse.Namespace) -> None:
    """Train and write.

    Raises:
        DataError: the images or their labels cannot be used.
    """
    images, _ = npz_training(asked.images)
    labels, test = npz_labels(asked.images, len(images)), npz_split(asked.images, "test")
    test_labels = split_labels(asked.images, "test_labels", len(test))
    if labels is None or test_labels is None:
        raise DataError(f"{asked.images} has no train_labels and test_labels: a classifier needs both")
    if not 0 <= asked.validation < len(images) or asked.epochs < 1 or asked.padding < 0:
        raise DataError(f"--validation must leave some of the {len(images)} images, --epochs be 1, --padding 0 or more")
    kept = len(images) - asked.validation
    truth = torch.from_numpy(labels.values)
    network = train_classifier(
        padded(images[:kept], asked.padding), truth[:kept], len(labels.names), asked.epochs, asked.seed
    )
    facts = {"name": asked.name, "class_names": list(labels.names), "accuracy": 0.0, "source": asked.source}
    facts |= {"seed": asked.seed, "epochs": asked.epochs, "trained_on": kept, "padding": asked.padding}
    save_classifier(asked.out, network, facts)
    found = load_classifier(asked.out).predict(padded(test, asked.padding))
    accuracy = (found == torch.from_numpy(test_labels)).double().mean().item()
    save_classifier(asked.out, network, facts | {"accuracy": round(accuracy, 4)})
    print(f"{asked.out}: {100 * accuracy:.2f} % of {len(test)} test images")


def padded(images: object, padding: int) -> torch.Tensor:
    """``(N, H, W, C)`` uint8 -> ``(N, C, H + 2 p, W + 2 p)`` in [-1, 1], black around."""
    return F.pad(to_tensor(images), (padding,) * 4, value=-1.0)


if __name__ == "__main__":
    main()
