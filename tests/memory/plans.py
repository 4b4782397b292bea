"""Plans for predictions, whatever this machine could run."""

import torch

from cogvx_fast.config import CompileMode
from cogvx_fast.memory import Option
from cogvx_fast.plan import AttentionPlan, EnginePlan, Offload, Product, VaePlan
from cogvx_fast.quantization.recipes import AS_THEY_ARE

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def plan(device=GPU, dtype=torch.bfloat16, recipe=AS_THEY_ARE, text_encoder=None, **fields):
    """A plan of these; on a GPU as it is in a graph of inductor, with our kernels."""
    on_gpu = device == GPU
    ours = "triton" if on_gpu else "torch"
    native = recipe is AS_THEY_ARE
    product = (Product.CUBLASLT if native else Product.MODULES) if on_gpu else Product.MODULES
    budget = fields.pop("budget", 0)
    return EnginePlan(
        **{
            "tier": "exact" if native else "balanced",
            "device": device,
            "dtype": dtype,
            "recipe": recipe,
            "text_encoder": text_encoder or recipe.text_encoder or "native",
            "attention": AttentionPlan(),
            "operations": ours,
            "product": product,
            "merges": True,
            "mixes": False,
            "compile": CompileMode.BLOCKS if on_gpu else CompileMode.OFF,
            "compile_why": "",
            "keeps_modulation": True,
            "keeps_text": True,
            "vae": VaePlan(device, dtype, operations=ours, convolution=ours, budget=budget),
            "offload": Offload.NONE,
            **fields,
        }
    )


def planner(device=GPU, dtype=torch.bfloat16, **fields):
    """`plan` for an option; a CPU packs where that is the option."""

    def plan_of(option: Option):
        packs = device == CPU and option.packs and option.recipe is AS_THEY_ARE
        product = {"product": Product.ONEDNN} if packs else {}
        of_option = {"recipe": option.recipe, "text_encoder": option.text_encoder, "offload": option.offload}
        return plan(device, dtype, **of_option, **product, **fields)

    return plan_of
