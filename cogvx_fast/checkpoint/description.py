"""What the JSON files of a checkpoint say: read once, with every value in bounds, for commands and pipelines alike.

Whoever builds a model from a configuration believes it: 10**30 layers are made one after the other, and a tokenizer of
an unknown class is offered to be run as code.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..family import Variant
from .errors import CheckpointError

INDEX = "model_index.json"
# The parts of a pipeline: their classes in `model_index.json`, and the files that configure them.
CLASSES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "text_encoder": ("T5EncoderModel",),
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": (),  # any of diffusers'
}
CONFIGS = {
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
VOCABULARIES = ("tokenizer/tokenizer.json", "tokenizer/spiece.model")
TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
_LARGEST_EXTRA = 1 << 16  # words that a tokenizer makes besides its vocabulary, one by one; T5 has 100
_LARGEST_JSON = 64 << 20  # bytes; a shard index of 5b has 80,000, a vocabulary of T5 2.4 million

# The largest values of what makes memory or work; what is not here may be anything that JSON calls a number.
_LARGEST: dict[str, dict[str, int]] = {
    "transformer": {
        "num_attention_heads": 1024,
        "attention_head_dim": 1024,
        "in_channels": 4096,
        "out_channels": 4096,
        "time_embed_dim": 1 << 16,
        "ofs_embed_dim": 1 << 16,
        "text_embed_dim": 1 << 16,
        "num_layers": 1000,
        "sample_width": 4096,
        "sample_height": 4096,
        "sample_frames": 1 << 14,
        "patch_size": 64,
        "patch_size_t": 64,
        "temporal_compression_ratio": 64,
        "max_text_seq_length": 1 << 16,
    },
    "text_encoder": {
        "vocab_size": 1 << 22,
        "d_model": 1 << 16,
        "d_kv": 1 << 12,
        "d_ff": 1 << 20,
        "num_layers": 1000,
        "num_heads": 1024,
        "relative_attention_num_buckets": 1 << 16,
        "relative_attention_max_distance": 1 << 16,
    },
    "vae": {
        "in_channels": 4096,
        "out_channels": 4096,
        "latent_channels": 4096,
        "layers_per_block": 100,
        "norm_num_groups": 1 << 16,
        "sample_height": 1 << 16,
        "sample_width": 1 << 16,
        "temporal_compression_ratio": 64,
    },
    "scheduler": {"num_train_timesteps": 1_000_000},
}
# What something is divided by, or a root is taken of.
_ABOVE_ZERO: dict[str, tuple[str, ...]] = {
    "transformer": ("norm_eps", "spatial_interpolation_scale", "temporal_interpolation_scale"),
    "text_encoder": ("layer_norm_epsilon",),
    "vae": ("norm_eps", "scaling_factor"),
    "scheduler": ("beta_start", "beta_end", "snr_shift_scale"),
}
# What some of diffusers' schedulers have by default, and so in what they save: no limit.
_INFINITE = (("lambda_min_clipped", -math.inf), ("s_tmax", math.inf))
_TRUE_OR_FALSE = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings")
_MAY_BE_NULL = ("patch_size_t", "ofs_embed_dim")
_LARGEST_TABLE = 1 << 32  # numbers in the transformer's table of positions, which is made, not loaded

Read = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A CogVideoX checkpoint as its JSON files describe it.

    Attributes:
        source: a folder, or the id of a repository on the Hugging Face Hub.
        tokenizer_class: of transformers.
        scheduler_class: of diffusers.
        stored_dtype: of the transformer's weights; None where that is not known before they are read.
        num_train_timesteps: of its scheduler, the most steps that it can take.
        variant: which member of the family it is.
        recipe, dtype: of one that `cogvx-fast quantize` has written, else None.
    """

    source: str
    pipeline_class: str = "CogVideoXPipeline"
    tokenizer_class: str = "T5Tokenizer"
    scheduler_class: str = "CogVideoXDDIMScheduler"
    stored_dtype: str | None = None
    num_train_timesteps: int = 1000
    variant: Variant = field(default_factory=Variant)
    recipe: str | None = None
    dtype: str | None = None

    @property
    def native_dtype(self) -> str:
        """The half precision its weights are stored in; else the one its kind was trained in."""
        if self.stored_dtype in ("float16", "bfloat16"):
            return self.stored_dtype
        return self.variant.trained_dtype


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        CheckpointError: for one that cannot be read or holds something else; FileNotFoundError if there is none.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device has no end
            raise CheckpointError("cannot be read (it is no file)", path)
        if status.st_size > _LARGEST_JSON:
            raise CheckpointError(f"has {status.st_size} bytes, more than any such file: at most {_LARGEST_JSON}", path)
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path) from None
    except RecursionError:
        raise CheckpointError("cannot be read (its JSON is nested too deep)", path) from None
    except UnicodeDecodeError:
        raise CheckpointError("cannot be read (it is not text in UTF-8)", path) from None
    except CheckpointError:
        raise
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise CheckpointError(f"cannot be read ({error})", path) from None
    if not isinstance(content, dict):
        raise CheckpointError("cannot be read (it is not a JSON object)", path)
    return content


def folder_reader(folder: Path) -> Read:
    """Reads a JSON file of the checkpoint in `folder` by its name, such as "vae/config.json"."""

    def read(name: str) -> dict[str, Any]:
        try:
            return read_json(folder / name)
        except FileNotFoundError:
            raise CheckpointError(
                f"has no {name}; must be a CogVideoX checkpoint in diffusers format", folder
            ) from None
        except CheckpointError as error:
            raise CheckpointError(f"its {name} {error.reason}", folder) from None

    return read


def hub_reader(repository: str, **hub: Any) -> Read:
    """Reads a JSON file of a repository on the Hugging Face Hub by its name; raises what the Hub does."""
    import huggingface_hub

    def read(name: str) -> dict[str, Any]:
        path = Path(huggingface_hub.hf_hub_download(repository, name, **hub))
        try:
            return read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"its {name} {error.reason}", repository) from None

    return read


def describe(
    source: str, read: Read, stored_dtype: str | None = None, given: Collection[str] = ()
) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    """The checkpoint `source`, and the configurations of its parts by name, those apart that have none.

    Args:
        read: a JSON file of it by its name.
        given: parts that are not taken from it, about which it may say anything.

    Raises:
        CheckpointError: for a file that is missing or broken, a class that is not the family's, a value out of bounds.
    """
    index = read(INDEX)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str) or "CogVideoX" not in pipeline_class:
        raise CheckpointError(f"is a {_short(pipeline_class)}; must be a CogVideoX checkpoint", source)
    configs = {}
    for part in CLASSES:
        if part in given or not _names_class(index, part, source) or part not in CONFIGS:
            continue
        configs[part] = read(CONFIGS[part])
        try:
            check_config(part, configs[part])
        except CheckpointError as error:
            raise CheckpointError(f"its {CONFIGS[part]} {error.reason}", source) from None

    def class_of(part: str, default: str) -> str:
        entry = index.get(part)
        return entry[1] if part not in given and isinstance(entry, list) and entry[1] else default

    return Checkpoint(
        source,
        pipeline_class,
        tokenizer_class=class_of("tokenizer", Checkpoint.tokenizer_class),
        scheduler_class=class_of("scheduler", Checkpoint.scheduler_class),
        stored_dtype=stored_dtype,
        num_train_timesteps=configs.get("scheduler", {}).get("num_train_timesteps", Checkpoint.num_train_timesteps),
        variant=Variant.of(configs.get("transformer", {})),
    ), configs


def _names_class(index: Mapping[str, Any], part: str, source: str) -> bool:
    """Whether the index has a class for `part`, which must be the family's; False where it says that there is none."""
    if part not in index:
        raise CheckpointError(f"its {INDEX} has no {part}; must be a CogVideoX checkpoint", source)
    entry = index[part]
    if entry is None or entry == [None, None]:
        return False
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise CheckpointError(f"its {INDEX} has {part}={_short(entry)}; must be [library, class]", source)
    library, name = entry
    if part == "scheduler":
        if library != "diffusers" or not name.isidentifier() or not name.endswith("Scheduler"):
            raise CheckpointError(f"its scheduler is a {_short(name)} of {_short(library)}; must be diffusers'", source)
    elif name not in CLASSES[part] or library not in ("diffusers", "transformers"):
        raise CheckpointError(f"its {part} is a {_short(name)}; must be a {CLASSES[part][0]}", source)
    return True


def check_vocabulary(folder: Path) -> None:
    """Raise a `CheckpointError` if the checkpoint in `folder` has a tokenizer without words.

    Of nothing transformers makes an empty tokenizer, and every prompt means the same.
    """
    if read_json(folder / INDEX).get("tokenizer") in (None, [None, None]):
        return
    config = folder / TOKENIZER_CONFIG
    try:
        there = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
        empty = next((path for path in there if path.stat().st_size == 0), None)
        extra = read_json(config).get("extra_ids", 0) if config.is_file() else 0
    except OSError as error:  # a folder that may not be looked into
        raise CheckpointError(f"cannot be read ({error.strerror})", folder / "tokenizer") from None
    if not there:
        raise CheckpointError(f"has no tokenizer: neither {' nor '.join(VOCABULARIES)}", folder)
    if empty is not None:
        raise CheckpointError("is empty", empty)
    if type(extra) is not int or not 0 <= extra <= _LARGEST_EXTRA:
        raise CheckpointError(f"has extra_ids={_short(extra)}; must be a whole number of 0 to {_LARGEST_EXTRA}", config)


def check_config(part: str, config: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` for a configuration of `part` with a class or a value that cannot be."""
    name = config.get("_class_name")
    if part in ("transformer", "vae") and name is not None and name not in CLASSES[part]:
        raise CheckpointError(f"is of a {_short(name)}; must be a {CLASSES[part][0]}")
    if part == "text_encoder" and config.get("model_type", "t5") != "t5":
        raise CheckpointError(f"is of the model type {_short(config['model_type'])}; must be t5")
    for key, value in _numbers(config):
        if isinstance(value, float) and not math.isfinite(value) and (key, value) not in _INFINITE:
            raise CheckpointError(f"has {key}={value}; must be finite")
    for key, largest in _LARGEST[part].items():
        if key not in config or (config[key] is None and key in _MAY_BE_NULL):
            continue
        value = config[key]
        if type(value) is not int or not 1 <= value <= largest:
            raise CheckpointError(f"has {key}={_short(value)}; must be a whole number of 1 to {largest}")
    for key in _ABOVE_ZERO[part]:
        value = config.get(key, 1)
        if isinstance(value, int | float) and value <= 0:  # another kind is refused where the part is made
            raise CheckpointError(f"has {key}={value}; must be above 0")
    for key in _TRUE_OR_FALSE if part == "transformer" else ():
        if not isinstance(config.get(key, False), bool):
            raise CheckpointError(f"has {key}={_short(config[key])}; must be true or false")
    if part == "transformer":
        _check_table(Variant.of(config))
    widths = config.get("block_out_channels", [1])
    if part == "vae" and not (
        isinstance(widths, list)
        and 1 <= len(widths) <= 16
        and all(type(width) is int and 1 <= width <= 1 << 16 for width in widths)
    ):
        raise CheckpointError(f"has block_out_channels={_short(widths)}; must be 1 to 16 whole numbers")


def _check_table(variant: Variant) -> None:
    tokens = variant.sample_frames * variant.sample_height * variant.sample_width
    if tokens * variant.width > _LARGEST_TABLE * variant.patch_size**2 * 4:
        raise CheckpointError(
            f"has sample_frames, sample_height, sample_width = {variant.sample_frames}, {variant.sample_height},"
            f" {variant.sample_width}; the table of positions would have more than {_LARGEST_TABLE} numbers"
        )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            yield key, one


def _short(value: object) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
