"""What a denoising step allocates beside the weights, from shapes alone.

A block's peak is counted in streams `(batch, sequence, dim)`, by going through its code. Alive all the time are the
stream that the first block got, and the block's input. Attention adds the normed stream, Q, K and V in one piece, Q and
K normed, and two results; the feed-forward attention's result, the stream after it, the normed stream, its inside,
which is four times as wide, and its result.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TURBO, CompileMode
from ..family import Variant
from ..parallel.degrees import ParallelConfig
from ..plan import EnginePlan, Product
from ..quantization.recipes import Scheme
from ..turbo.schedule import HISTORY


@dataclass(frozen=True)
class Tokens:
    """What goes through the transformer in a generation.

    Attributes:
        text, video: tokens of one sample.
        batch: samples of a step, two for each video with guidance.
        steps: of the generation.
        reads_positions: whether the model's own table of positions is of that size and dtype: no other is kept then.
    """

    text: int
    video: int
    batch: int = 2
    steps: int = 50
    reads_positions: bool = True

    @property
    def rows(self) -> int:
        """Rows of the joint stream of text and video, all samples together."""
        return self.batch * (self.text + self.video)

    def shared(self, parallel: ParallelConfig) -> int:
        """Of these rows, those of the process that has most."""
        batch = self.batch // parallel.guidance if self.batch % parallel.guidance == 0 else self.batch
        return batch * -(-(self.text + self.video) // parallel.sequence)


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


def step_memory(variant: Variant, tokens: Tokens, plan: EnginePlan, mapped: bool = False) -> StepMemory:
    """What a step of `tokens` takes beside the weights, run by `plan`.

    Tensors alone: what the allocator keeps and the libraries' own buffers come on top. Counted against a CPU's
    allocator; for a GPU it is arithmetic.

    Args:
        mapped: whether the weights lie in a file that is mapped, as loading leaves them on a CPU: where Q, K and V are
            merged, their own weights then go on counting.
    """
    width, layers, each = variant.width, variant.num_layers, plan.dtype.itemsize
    numbers = tokens.shared(plan.parallel) * width
    modulation = (layers * 12 + 2) * width * each
    kept = _buffer(plan.product, numbers, each)
    if not variant.use_rotary_positional_embeddings and not tokens.reads_positions:
        kept += (tokens.text + tokens.video) * width * each  # one for all samples
    kept += tokens.steps * modulation if plan.keeps_modulation else 0
    kept += tokens.batch * tokens.text * width * each if plan.keeps_text else 0
    kept += HISTORY * tokens.batch * tokens.video * variant.numbers_per_token * each if plan.tier == TURBO else 0
    peak = _block_peak(plan, numbers, width) + _exchanged(plan, numbers * each)
    peak += 0 if plan.keeps_modulation else tokens.batch * modulation
    return StepMemory(layers * _copied(plan, mapped) * width**2 * each, kept, peak)


def _exchanged(plan: EnginePlan, stream: int) -> int:
    """What attention over several processes adds to Q, K and V of this one: what is sent, and what comes.

    With ulysses Q, K and V in one piece and in the order in which they are sent, or that and what has come; with a ring
    keys and values, the next ones, a sum in fp32 and its next value.
    """
    peak = 6 * stream if plan.parallel.ulysses > 1 else 0
    return peak + (4 * stream + 8 * stream // plan.dtype.itemsize if plan.parallel.ring > 1 else 0)


def _copied(plan: EnginePlan, mapped: bool) -> int:
    """Of a block's twelve square matrices, how many are there a second time."""
    if plan.product is Product.ONEDNN:
        return 12
    can_merge = plan.product is Product.BUFFERED or (plan.product is Product.MODULES and _scheme(plan) is None)
    return 3 if mapped and plan.merges and can_merge else 0


def _buffer(product: Product, numbers: int, each: int) -> int:
    """Of the buffers that all blocks use: the feed-forward's inside, in int8 its sums."""
    if product is Product.BUFFERED:
        return 4 * numbers * each
    return 4 * numbers * 4 if product is Product.INT8 else 0


def _block_peak(plan: EnginePlan, numbers: int, width: int) -> int:
    """Of a stream of `numbers` numbers; comments name what is alive in order."""
    stream, byte = numbers * plan.dtype.itemsize, numbers
    # First stream, input, attention's result, stream after it, normed; chained, the input's norm waits with its caller.
    forward = (6 if plan.chains else 5) * stream
    match plan.product:
        case Product.CUBLASLT | Product.ONEDNN:
            return forward + 5 * stream  # attention's ten streams are no more
        case Product.BUFFERED:
            return 7 * stream  # as attention's, but Q, K and V lie in the buffer; the feed-forward takes no more
        case Product.INT8:
            return 10 * stream + byte + numbers // width * 4  # attention's rows in int8, and their scales
        case Product.SCALED:
            # Of attention, whose norm and result are in 8 bits when they are multiplied.
            return 9 * stream + 2 * byte
        case Product.MODULES:
            return _modules_peak(plan, numbers, forward, 4 * width**2)


def _modules_peak(plan: EnginePlan, numbers: int, forward: int, weight: int) -> int:
    """Where the linears are called: torch's products, or torchao's, which inductor makes one graph of with the rest.

    Args:
        forward: bytes alive around the feed-forward.
        weight: numbers of each of the feed-forward's matrices, the largest.
    """
    each, byte, sums = plan.dtype.itemsize, numbers, 4 * numbers * 4
    stream, in_graph = numbers * each, plan.compile is not CompileMode.OFF
    match _scheme(plan):
        case None:
            return forward + 8 * stream  # before GELU and after it; attention's ten streams are no more
        case Scheme.FP8_WEIGHT if not in_graph:
            # The weight, and before it in fp32 its values and their product with the scales; in fp32 it is the latter.
            widened = weight * (4 if each == 4 else each + 4) + weight * 4
            return max(forward + 8 * stream, forward + 4 * stream + widened)
        case Scheme.INT8_WEIGHT | Scheme.FP8_WEIGHT:
            return max(forward + 8 * stream, forward + 5 * stream + weight * each)
        case Scheme.INT8 if not in_graph:
            # int32 sums, and the result before and after its scale; or the weights, whose sums are taken in int64.
            return max(forward + byte + sums + 8 * stream, forward + 5 * stream + 4 * byte + 8 * weight)
        case Scheme.INT8:
            return forward + byte + sums + 4 * stream
        case Scheme.FP8:
            return max(10 * stream + byte, forward + 5 * stream + 5 * byte)


def _scheme(plan: EnginePlan) -> Scheme | None:
    """Of the linears that torchao has quantized, all by one; None for plain ones."""
    return next(iter(plan.recipe.schemes), None)
