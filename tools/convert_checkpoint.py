"""Convert a published checkpoint to a folder in diffusers' layout.

    python tools/convert_checkpoint.py checkpoints/ldm_ffhq256.pt checkpoints/ldm_ffhq256

Reads latent diffusion (CompVis) and guided diffusion (OpenAI): four published models (--family), and others whose
heads, image size, betas and null class are said (--architecture). Nothing in the file is run; every key is used once
or listed as dropped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

from particledaps.priors.conversion.convert import ConversionCard, convert_checkpoint
from particledaps.priors.conversion.families import FAMILIES, OPTIONS
from particledaps.priors.conversion.schedule import schedule_text
from particledaps.priors.errors import PriorError


def summary(card: ConversionCard, target: Path) -> str:
    """The card in a few lines."""
    lines = [f"{target}: {card.family} from {card.source_file} (sha256 {card.source_sha256[:16]}...)"]
    lines += [f"  {name}: {count:,} parameters" for name, count in card.parameters.items()]
    weights = "averaged (EMA)" if card.ema else "as stored"
    lines.append(f"  weights {weights}; {card.used_keys} of {card.source_keys} keys used")
    lines += _places(card) + _facts(card)
    lines += [f"  dropped {n} {prefix}: {card.reasons[prefix]}" for prefix, n in card.dropped.items()]
    lines += [f"  dropped rows {a}-{b - 1} of {key}: learned variance" for key, (a, b) in card.dropped_rows.items()]
    if card.num_classes:
        null = "none of them is 'none'" if card.null_class is None else f"{card.null_class} is 'none'"
        lines.append(f"  {card.num_classes} classes, {null}{_origin(card, 'null class')}")
    return "\n".join(lines)


def _places(card: ConversionCard) -> list[str]:
    """Where in the file the weights stand, and what was taken off their names."""
    beside = f"; left out: {', '.join(card.other_entries)}" if card.other_entries else ""
    entry = [f"  read from its entry {card.entry or '(none)'}{beside}"] if card.entry or beside else []
    return entry + [f"  removed {name} from {count} names" for name, count in card.removed_names.items()]


def _facts(card: ConversionCard) -> list[str]:
    """What the tensors do not tell, and where it comes from; nothing for cards of before it was recorded."""
    if not card.schedule:
        return []
    heads = "heads of attention" if card.num_heads is None else f"{card.num_heads} heads everywhere, set at loading"
    return [
        f"  predicts {card.prediction_type}{_origin(card, 'prediction type')}",
        f"  betas {schedule_text(card.schedule)}{_origin(card, 'betas')}",
        f"  images of {card.image_size} px{_origin(card, 'image size')}; {heads}{_origin(card, 'heads')}",
    ]


def _origin(card: ConversionCard, fact: str) -> str:
    return f" (from {card.origins[fact]})" if fact in card.origins else ""


def number(text: str) -> int | float | str:
    """A value of an option: an integer, else a number, else the text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def pairs(items: list[str]) -> dict[str, int | float | str]:
    """``key=value`` arguments as a mapping.

    Raises:
        PriorError: one has no '='.
    """
    if wrong := [item for item in items if "=" not in item]:
        raise PriorError(f"--architecture takes key=value, not {wrong[0]}; keys: {', '.join(OPTIONS)}")
    split = (item.split("=", 1) for item in items)
    return {key: number(value) for key, value in split}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert a published checkpoint to diffusers' layout.")
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint (.ckpt, .pt, .pth, .safetensors)")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--family", choices=FAMILIES, help="the published model that it is; default: by its tensors")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="raw instead of averaged weights")
    parser.add_argument(
        "--architecture",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"what the tensors do not tell, where it is no published model or differs: {', '.join(OPTIONS)}",
    )
    options = parser.parse_args(arguments)
    try:
        architecture = pairs(options.architecture)
        card = convert_checkpoint(
            options.source,
            options.target,
            options.family,
            options.ema,
            architecture,
            lambda line: print(line, flush=True),
        )
    except (PriorError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    print(summary(card, options.target))


if __name__ == "__main__":
    main()
