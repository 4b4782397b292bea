"""The demo's tokenizer: T5's own class over the few hundred words of the prompt grammar.

Every word of the grammar is one piece; single letters, digits and punctuation catch the rest, so that
an unknown word becomes letters rather than an error. T5's tokenizer keeps no lower-casing rule when it
is saved, so each piece exists in lower case, Capitalised and in CAPITALS: training sees lower case
alone, and `tie_cases` gives the others the same embeddings afterwards.
"""

from __future__ import annotations

import math
import random
import string

import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cogvx_fast.family import TEXT_TOKENS

from .data import ALL_SCENES, BACKGROUNDS, COLORS, MOTIONS, SHAPES, TRAINING, describe

WORD_DIM = 128
_WORD_SCORE, _LETTER_SCORE = -4.0, -12.0


def vocabulary() -> list[str]:
    """All words that the grammar can produce, sorted; found by sampling it often, with a fixed seed."""
    rng = random.Random(0)
    words = set()
    for scene in ALL_SCENES:
        for _ in range(60):
            words.update(describe(scene, rng).replace(",", " ").split())
    return sorted(words)


def pieces() -> list[tuple[str, float]]:
    """The unigram vocabulary with scores: ids 0, 1, 2 are pad, end and unknown as in T5, then words, then letters."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}
    for word in vocabulary():
        for case in (word, word.capitalize(), word.upper()):
            scores.setdefault(f"▁{case}", _WORD_SCORE)
    for letter in string.ascii_letters + string.digits + ".,;:!?'\"-()":
        scores.setdefault(letter, _LETTER_SCORE)
    return list(scores.items())


def build_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=pieces(), extra_ids=0, model_max_length=TEXT_TOKENS)


@torch.no_grad()
def tie_cases(text_encoder: T5EncoderModel) -> None:
    """Give every piece with capitals the embedding of its lower-case twin, in place."""
    names = [name for name, _ in pieces()]
    index = {name: i for i, name in enumerate(names)}
    weight = text_encoder.get_input_embeddings().weight
    for i, name in enumerate(names):
        weight[i] = weight[index.get(name.lower(), i)]


def disturb(sentence: str, rng: random.Random) -> str:
    """What people also type: now and then an unknown word in the middle, or a full stop at the end."""
    words = sentence.split(" ")
    if rng.random() < 0.15:
        letters = rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))
        words.insert(rng.randint(0, len(words)), "".join(letters))
    return " ".join(words) + ("." if rng.random() < 0.2 else "")


_FACTORS = {"shape": SHAPES, "color": tuple(COLORS), "background": tuple(BACKGROUNDS), "motion": tuple(MOTIONS)}


def teach_words(text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, steps: int = 1200, batch: int = 64) -> None:
    """Train the encoder so that every token, padding too, tells all four factors of the scene; in place.

    Random embeddings say "left" at one token alone and faintly; a denoiser that is trained with them learns
    colours, which fill areas, long before it learns ways. The heads that read the factors are thrown away.
    """
    torch.manual_seed(1)
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(WORD_DIM, len(values)) for name, values in _FACTORS.items()})
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=2e-3, betas=(0.9, 0.98))
    for step in range(steps):
        rng = random.Random(f"words {step}")
        scenes = [rng.choice(TRAINING) for _ in range(batch)]
        prompts = [disturb(describe(scene, rng), rng) for scene in scenes]
        length = max(len(ids) for ids in tokenizer(prompts).input_ids) + rng.choice((0, 4, 8, 40))
        ids = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        embeds = text_encoder(ids)[0]
        loss = torch.zeros(())
        for name, values in _FACTORS.items():
            labels = torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            loss = loss + F.cross_entropy(heads[name](embeds).transpose(1, 2), labels[:, None].expand(-1, length))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"words {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """A two-layer T5 encoder; trained together with the denoiser."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=WORD_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
