"""Convert a published checkpoint to a folder in diffusers' layout.

    python tools/convert_checkpoint.py checkpoints/ldm_ffhq256.pt checkpoints/ldm_ffhq256

Reads latent diffusion (CompVis: FFHQ, ImageNet) and guided diffusion (OpenAI: FFHQ, ImageNet). Nothing in the file is
run; every key is used once or listed as dropped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from priors.conversion.families import FAMILIES, OPTIONS
from priors.convert import Card, convert_checkpoint
from priors.prior import PriorError


def summary(card: Card, target: Path) -> str:
    """The card in a few lines."""
    lines = [f"{target}: {card.family} from {card.source_file} (sha256 {card.source_sha256[:16]}...)"]
    lines += [f"  {name}: {count:,} parameters" for name, count in card.parameters.items()]
    weights = "averaged (EMA)" if card.ema else "as stored"
    lines.append(f"  weights {weights}; {card.used_keys} of {card.source_keys} keys used")
    lines += [f"  dropped {n} {prefix}: {card.reasons[prefix]}" for prefix, n in card.dropped.items()]
    lines += [f"  dropped rows {a}-{b - 1} of {key}: learned variance" for key, (a, b) in card.dropped_rows.items()]
    if card.num_classes:
        null = "none of them is 'none'" if card.null_class is None else f"{card.null_class} is 'none'"
        lines.append(f"  {card.num_classes} classes, {null}")
    return "\n".join(lines)


def pairs(items: list[str]) -> dict[str, int | str]:
    """``key=value`` arguments as a mapping.

    Raises:
        PriorError: one has no '='.
    """
    if wrong := [item for item in items if "=" not in item]:
        raise PriorError(f"--architecture takes key=value, not {wrong[0]}; keys: {', '.join(OPTIONS)}")
    split = (item.split("=", 1) for item in items)
    return {key: int(value) if value.isdigit() else value for key, value in split}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert a published checkpoint to diffusers' layout.")
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint (.ckpt, .pt, .pth, .safetensors)")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--family", choices=FAMILIES, help="default: recognised from keys and shapes")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="raw instead of averaged weights")
    parser.add_argument(
        "--architecture",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"what shapes do not tell, where it differs from the published model: {', '.join(OPTIONS)}",
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
