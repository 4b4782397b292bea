"""What a generation allocates beside the weights, from shapes alone: the tensors of `plan`, `block` and `session`.

A block's peak is counted in streams `(batch, sequence, dim)`, by going through its code. Alive all the time are the
stream that the first block got, and the block's input. Attention adds the normed stream, Q, K and V in one piece, Q and
K normed, and two results; the feed-forward attention's result, the stream after it, the normed stream, its inside,
which is four times as wide, and its result.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from cogvx_kernels.cpu import int8
from cogvx_kernels.cpu import linear as onednn
from cogvx_kernels.cpu import stream as cpu_stream
from cogvx_kernels.triton import why_not as why_not_triton

from ..config import EngineConfig, QuantizedGemm
from ..quantization.recipes import Recipe, Scheme


class Product(enum.Enum):
    """What multiplies in a block, as far as it matters for memory."""

    FUSED = "bias and GELU in the product"
    BUFFERED = "fp32 on a CPU, whose wide activations lie in a buffer for all blocks"
    PLAIN = "the modules, GELU for itself"
    WIDENED = "8-bit weights that are widened when used"
    WIDENED_FP8 = "fp8 weights that are widened by way of fp32"
    INT8 = "int8 products of our own"
    TORCHAO_INT8 = "torchao's int8 products, one operation after the other"
    SCALED = "8-bit products of our own on a GPU, which take norms in 8 bits"
    COMPILED_INT8 = "torchao's int8 products in a graph of inductor"
    COMPILED_FP8 = "torchao's fp8 products in a graph of inductor"


@dataclass(frozen=True)
class Way:
    """How the blocks run: the product, whether copies of plain weights are held in oneDNN's order, and whether a
    block's last addition is left to the norm of the next."""

    product: Product
    packs: bool = False
    chains: bool = False

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, config: EngineConfig, recipe: Recipe | None) -> Way:
        """What `plan.plan_block` will choose on `device`, without a weight to look at."""
        if device.type == "cpu":
            fuses = dtype in cpu_stream.DTYPES and cpu_stream.why_not() is None
        else:
            fuses = device.type == "cuda" and why_not_triton(device) is None
        way = cls._of_device(device, dtype, config, recipe)
        return replace(way, chains=config.fuse_operations and fuses)

    @classmethod
    def _of_device(cls, device: torch.device, dtype: torch.dtype, config: EngineConfig, recipe: Recipe | None) -> Way:
        scheme = None if recipe is None else recipe.schemes[0]
        if device.type != "cpu":
            ours = config.gemm is not QuantizedGemm.TORCHAO and why_not_triton(device) is None
            if device.type == "cuda" and ours and scheme in (Scheme.INT8, Scheme.FP8):
                return cls(Product.SCALED)
            in_graph = {Scheme.INT8: Product.COMPILED_INT8, Scheme.FP8: Product.COMPILED_FP8}
            plain = Product.FUSED if device.type == "cuda" and config.fuse_operations else Product.PLAIN
            return cls(plain if scheme is None else in_graph.get(scheme, Product.WIDENED))
        if scheme is Scheme.INT8:
            ours = config.gemm is not QuantizedGemm.TORCHAO and int8.why_not() is None and dtype in int8.DTYPES
            return cls(Product.INT8 if ours else Product.TORCHAO_INT8)
        if scheme is not None:
            return cls(Product.WIDENED_FP8 if scheme is Scheme.FP8_WEIGHT else Product.WIDENED)
        if config.pack_weights and dtype in onednn.DTYPES and onednn.why_not() is None:
            return cls(Product.FUSED, packs=True)
        native = config.fuse_operations and dtype == torch.float32 and cpu_stream.why_not() is None
        return cls(Product.BUFFERED if native else Product.PLAIN)


@dataclass(frozen=True)
class Clip:
    """What goes through the transformer: samples of a step (two with guidance), tokens of each, and steps.

    `reads_positions`: whether the model's own table of positions is of that size and dtype: no other is kept then.
    """

    text_tokens: int
    video_tokens: int
    batch: int = 2
    steps: int = 50
    reads_positions: bool = True

    @property
    def rows(self) -> int:
        return self.batch * (self.text_tokens + self.video_tokens)


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the weights.

    Attributes:
        packed: copies of weights, in oneDNN's order or merged, held while a generation denoises.
        kept: tables, the projected text, positions and the blocks' common buffers, likewise.
        peak: what a step allocates on top at its worst moment.
    """

    packed: int
    kept: int
    peak: int

    @property
    def total(self) -> int:
        return self.packed + self.kept + self.peak


def step_memory(
    transformer: Mapping[str, Any],
    clip: Clip,
    dtype: torch.dtype,
    way: Way,
    config: EngineConfig,
    mapped: bool = False,
) -> StepMemory:
    """
    Args:
        transformer: its configuration, as its `config.json` has it, with nothing left out.
        mapped: whether the weights lie in a file that is mapped, as loading leaves them on a CPU: where Q, K and V are
            merged, their own weights then go on counting.

    Tensors alone: what the allocator keeps and the libraries' own buffers come on top. Counted against a CPU's
    allocator; for a GPU it is arithmetic.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, each = transformer["num_layers"], dtype.itemsize
    merges = mapped and config.fuse_projections and way.product in (Product.BUFFERED, Product.PLAIN)
    packed = layers * (12 if way.packs else 3 if merges else 0) * width**2 * each
    modulation = (layers * 12 + 2) * width * each
    text = clip.batch * clip.text_tokens * width * each
    adds_positions = not transformer["use_rotary_positional_embeddings"] and not clip.reads_positions
    kept = clip.rows // clip.batch * width * each if adds_positions else 0  # one for all samples
    kept += clip.steps * modulation if config.modulation_table else 0
    kept += text if config.reuse_text_projection else 0
    kept += _buffer(way.product, clip.rows * width, each)
    peak = _block_peak(way, clip.rows * width, width, each, config)
    return StepMemory(packed, kept, peak + (0 if config.modulation_table else clip.batch * modulation))


def _buffer(product: Product, numbers: int, each: int) -> int:
    """Of the buffers that all blocks use: the feed-forward's inside, in int8 its sums."""
    if product is Product.BUFFERED:
        return 4 * numbers * each
    return 4 * numbers * 4 if product is Product.INT8 else 0


def _block_peak(way: Way, numbers: int, width: int, each: int, config: EngineConfig) -> int:
    """Of a stream of `numbers` numbers of `each` bytes; comments name what is alive in order."""
    product, stream, byte, sums = way.product, numbers * each, numbers, 4 * numbers * 4
    weight = 4 * width**2  # numbers of the feed-forward's matrices, the largest
    # Q, K and V by a merged product lie in one piece until their attention is projected; apart, Q and K go when normed.
    merged = 10 * stream if config.fuse_projections or product is Product.FUSED else 8 * stream
    # First stream, input, attention's result, stream after it, normed; chained, the input's norm waits with its caller.
    forward = (6 if way.chains else 5) * stream
    match product:
        case Product.FUSED:
            return max(merged, forward + 5 * stream)
        case Product.BUFFERED:
            return 7 * stream  # as merged, but Q, K and V lie in the buffer; the feed-forward takes no more
        case Product.PLAIN:
            return max(merged, forward + 8 * stream)  # before GELU and after it
        case Product.WIDENED:
            return max(forward + 8 * stream, forward + 5 * stream + weight * each)
        case Product.WIDENED_FP8:
            # The weight, and before it in fp32 its values and their product with the scales; in fp32 it is the latter.
            widened = weight * (4 if each == 4 else each + 4) + weight * 4
            return max(forward + 8 * stream, forward + 4 * stream + widened)
        case Product.INT8:
            return 10 * stream + byte + numbers // width * 4  # attention's rows in int8, and their scales
        case Product.TORCHAO_INT8:
            # int32 sums, and the result before and after its scale; or the weights, whose sums are taken in int64.
            return max(forward + byte + sums + 8 * stream, forward + 5 * stream + 4 * byte + 8 * weight)
        case Product.SCALED:
            # Of attention, whose norm and result are in 8 bits when they are multiplied.
            return 9 * stream + 2 * byte
        case Product.COMPILED_INT8:
            return forward + byte + sums + 4 * stream
        case Product.COMPILED_FP8:
            return max(10 * stream + byte, forward + 5 * stream + 5 * byte)
