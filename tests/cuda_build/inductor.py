"""What inductor generates for a GPU that is not there: a CUDA build of torch, told that it has one.

Nothing is launched and no memory of a GPU is taken: tensors are fake, and of a compiled graph only the code is made.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.utils
import torch.utils._triton
from cogvx_kernels import aot
from cogvx_kernels.targets import Target
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.codecache import CacheBase, PyCodeCache
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from triton.compiler import CompiledKernel

# A kernel's definition, and a line of the wrapper that launches one or calls a library.
_DEFINED = re.compile(r"^(\w+) = async_compile\.triton\('(\w+)', '''\n(.*?)'''", re.MULTILINE | re.DOTALL)
_LAUNCHED = re.compile(r"^\s*(?:(\w+)\.run\(|(?:\w+ = )?(?:extern_kernels|torch\.ops\.\w+)\.(\w+)[.(])", re.MULTILINE)


class _CodeIsThereError(Exception):
    """Ends a compilation where something would be loaded onto a GPU next."""


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in generated code.

    Attributes:
        name: the function's own, without `_kernel`.
        by_user: written by hand; else inductor has made it.
        tuner: inductor's object that compiles it in each of its configurations.
    """

    name: str
    by_user: bool
    tuner: Any

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of the arguments, by name."""
        return self.tuner.triton_meta["signature"]

    def compile(self) -> CompiledKernel:
        """In its first configuration, with the signature and the constants of the code; under `pretend`."""
        return self.tuner._precompile_config(self.tuner.configs[0]).kernel


@dataclass(frozen=True)
class Code:
    """Of one graph.

    Attributes:
        text: Python, as inductor writes it.
        kernels: Triton's, each definition once.
        launched: in order: Triton's kernels by name, products and other calls of libraries as inductor calls them.
    """

    text: str
    kernels: list[Kernel]
    launched: list[str]


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Within the block torch, inductor and Triton take this machine for one with one such GPU."""
    assert target.capability is not None
    major, minor = target.capability
    properties = SimpleNamespace(
        name=f"pretended {target.name}",
        major=major,
        minor=minor,
        multi_processor_count=target.boards[0].multiprocessors,
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=32 * target.limits.warps,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=target.limits.shared_per_program,
        shared_memory_per_multiprocessor=target.limits.shared,
        total_memory=80 << 30,
        L2_cache_size=40 << 20,
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": target.capability,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    with contextlib.ExitStack() as stack:
        interface = device_interface.CudaInterface
        for name, answer in answers.items():
            function = _constant(answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
            for owner in (interface, interface.Worker):  # they have taken torch's functions when they were defined
                if name in vars(owner):
                    stack.enter_context(mock.patch.object(owner, name, staticmethod(function)))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_current_devices, cuda=0))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, cuda=[properties]))
        torch._C._ensureCUDADeviceGuardSet()  # C++ would ask a driver which device is the current one
        # Dynamo would ask for the current stream, which only a driver has.
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", _constant(False)))
        # Before it compiles, inductor has Triton look for a driver.
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", _constant(None)))
        stack.enter_context(_flash_attention())
        # A fake tensor makes a real one first, so that the GPU has a context.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _constant(None)))
        # The patterns that inductor looks for are traced with examples, some of them real tensors: any device does.
        patterns = _ignoring(joint_graph.lazy_init, torch.device("cpu"))
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init", patterns))
        stack.enter_context(aot.pretend(target))
        # The launcher that is loaded from a file gives no machine code to read.
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False, use_static_triton_launcher=False))
        stack.enter_context(_forgotten())
        yield


def _constant(value: Any) -> Callable[..., Any]:
    def answer(*_: Any, **__: Any) -> Any:
        return value

    return answer


def _ignoring(function: Callable[..., Any], *instead: Any) -> Callable[..., Any]:
    return lambda *_: function(*instead)


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Within the block `F.scaled_dot_product_attention` is flash-attention.

    Which of its kernels runs is decided in C++, by a driver; without one it would be products and a softmax of all
    scores.
    """

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        assert mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already
        library.impl("scaled_dot_product_attention", attention, "CompositeImplicitAutograd")
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def _forgotten() -> Iterator[None]:
    """What is remembered of devices belongs to one pretended GPU only."""

    def forget() -> None:
        torch.compiler.reset()
        of_modules = [
            value for module in (torch.utils._triton, torch._inductor.utils) for value in vars(module).values()
        ]
        for function in (DeviceProperties.create, CacheBase.get_system, *of_modules):
            if callable(getattr(function, "cache_clear", None)):
                function.cache_clear()

    forget()
    try:
        yield
    finally:
        forget()


def code_of(function: Callable[..., Any], *arguments: Any) -> Code:
    """What `torch.compile(function, fullgraph=True)` makes for fake tensors on the GPU of `pretend`.

    Raises:
        torch._dynamo.exc.TorchDynamoException: where dynamo does not take all of it as one graph.
    """
    texts: list[str] = []

    def stop(graph: GraphLowering) -> None:
        wrapper, _ = graph.codegen()
        texts.append(wrapper.value)
        raise _CodeIsThereError

    with (
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
        torch.no_grad(),
    ):
        try:
            torch.compile(function, fullgraph=True)(*arguments)
        except Exception as error:  # dynamo wraps what its backend raises
            if not any(isinstance(cause, _CodeIsThereError) for cause in _causes(error)):
                raise
    (text,) = texts
    return _read(text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _read(text: str) -> Code:
    kernels = {}
    for variable, name, source in _DEFINED.findall(text):
        tuner = getattr(PyCodeCache.load(source), name)
        by_user = bool(tuner.custom_kernel)
        kernels[variable] = Kernel(name.removesuffix("_kernel"), by_user, tuner)
    calls = text[text.index("def call(") :]
    launched = [kernels[ours].name if ours else theirs for ours, theirs in _LAUNCHED.findall(calls)]
    return Code(text, list(kernels.values()), launched)
