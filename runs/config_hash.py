"""The hash of what determines a run's numbers."""

import hashlib
import json
from typing import Any

SILENT_AT_DEFAULT = {  # keys without effect at these values: the hash is the same with and without them
    ("model", "class_id"): None,
    ("model", "prompt"): "",
    ("model", "guidance_scale"): 1.0,
    ("model", "latent_scale"): None,
    ("model", "image_size"): None,
    ("sampler", "families"): {},
}
NOT_IN_HASH = ("save_dir", "name", "device", "gpu", "use_tpu", "save_trajectory")


def config_sha256(config: dict[str, Any]) -> str:
    """Hash of what determines the numbers: everything but where, on what and for which image ids."""
    kept = {k: v for k, v in config.items() if k not in NOT_IN_HASH}
    kept["data"] = {k: v for k, v in config["data"].items() if k not in ("start_id", "end_id")}
    for (part, key), default in SILENT_AT_DEFAULT.items():
        if part in kept and kept[part].get(key, default) == default:
            kept[part] = {k: v for k, v in kept[part].items() if k != key}
    if config.get("model", {}).get("family") != "sd" and "sd" in config.get("task", {}).get("mcmc", {}):
        others = {k: v for k, v in config["task"]["mcmc"].items() if k != "sd"}
        kept["task"] = config["task"] | {"mcmc": others}  # without effect for other families too
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
