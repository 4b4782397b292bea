"""What a step should take on several GPUs: arithmetic from shapes and datasheets. No GPU has confirmed it here.

`python -m cogvx_fast.parallel.prediction` prints the table of docs/parallel.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from .degrees import ParallelConfig, choose
from .traffic import step_traffic

# Of the peak, what diffusers reaches with CogVideoX on an A100: 240 TFLOP of 2b's step with guidance in 1.44 s, and 664
# of 5b's in 4.07 s, are 53 and 52 % (times: xDiT's charts, docs/performance/cogvideo.md).
ATTAINED = 0.53
# Of a link's bandwidth, and seconds until a collective begins: assumptions of the usual size, not measured.
OF_THE_LINK = 0.8
BEGIN = 20e-6


@dataclass(frozen=True)
class Card:
    """A GPU and what joins it to its neighbours.

    Attributes:
        tflops: dense, fp16 with sums in fp32, by its datasheet.
        link: bytes a second in one direction, by the datasheet: NVLink, or PCIe 4.0 with 16 lanes.
    """

    name: str
    tflops: float
    link: float
    joined_by: str


CARDS = (
    Card("A100", 312, 300e9, "NVLink"),
    Card("A100", 312, 32e9, "PCIe 4.0"),
    Card("H100", 989, 450e9, "NVLink"),
    Card("L40", 181, 32e9, "PCIe 4.0"),
    Card("RTX 4090", 165, 32e9, "PCIe 4.0"),
)


@dataclass(frozen=True)
class Size:
    """A transformer and a clip.

    Attributes:
        rows, text: of the stream of a sample, and of these the text's.
        numbers_per_token: that the network predicts.
    """

    name: str
    heads: int
    layers: int
    rows: int
    text: int = 226
    head_dim: int = 64
    numbers_per_token: int = 64

    @property
    def attention_flop(self) -> float:
        """Of a step with guidance: products with keys and with values."""
        return 2 * self.layers * 4 * self.rows**2 * self.heads * self.head_dim

    @property
    def flop(self) -> float:
        """Of a step with guidance: attention, and in each layer the products with twelve square matrices."""
        return self.attention_flop + 2 * self.layers * 24 * self.rows * (self.heads * self.head_dim) ** 2


SIZES = (Size("2b", 30, 30, 17776), Size("5b", 48, 42, 17776), Size("1.5-5b, 81 frames", 48, 42, 45106))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and what they are made of.

    Attributes:
        compute: the arithmetic, shared out evenly.
        exchange: bytes over the link and the beginnings of collectives, none of it hidden behind the arithmetic.
    """

    config: ParallelConfig
    compute: float
    exchange: float

    @property
    def step(self) -> float:
        return self.compute + self.exchange


def predicted(card: Card, size: Size, gpus: int, itemsize: int = 2) -> Prediction:
    """A step with guidance on `gpus` of `card` in the degrees that "auto" takes."""
    config = choose(gpus, size.heads, guided=True)
    sent = step_traffic(
        config,
        rows=size.rows,
        text=size.text,
        heads=size.heads,
        head_dim=size.head_dim,
        layers=size.layers,
        numbers_per_token=size.numbers_per_token,
        samples=2,
        itemsize=itemsize,
    )
    collectives = size.layers * (2 * (config.ulysses > 1) + (config.ring - 1)) + 2 * (gpus > 1)
    exchange = sent.total / (card.link * OF_THE_LINK) + collectives * BEGIN
    return Prediction(config, size.flop / (card.tflops * 1e12 * ATTAINED) / gpus, exchange)


def table(gpus: tuple[int, ...] = (2, 4, 8)) -> str:
    """Of each transformer and card how many times sooner a step ends than on one, in Markdown."""
    lines = [["a step of", "on", *(f"{number} GPUs" for number in gpus)]]
    lines.append(["---"] * len(lines[0]))
    for size in SIZES:
        for card in CARDS:
            alone = predicted(card, size, 1).step
            gains = [f"{alone / predicted(card, size, number).step:.2f} x" for number in gpus]
            lines.append([size.name, f"{card.name}, {card.joined_by}", *gains])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
