"""`nec bench train`: training steps and encoders beside timm's plain Vision Transformer or ConvNeXt V2, in one run."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nec_ray.errors import InputError
from nec_ray.evaluate.bench import machine
from nec_ray.models.convnext import PATCHES, ConvNextConfig, ConvNextEncoder
from nec_ray.models.convnext import SIZES as CONVNEXT_SIZES
from nec_ray.models.mae import SIZES, MaeConfig, random_keep
from nec_ray.models.mp_mae import MASK_RATIO
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.models.optimise import choose_attention, gradients, parameter_groups

_PATCH = 16
_MASK = 0.75
_SECONDS = 2.0
_ROUNDS = 5
_MATMUL = {"cpu": 2048, "cuda": 8192}

_BANDS = 12
_LR, _DECAY = 1e-4, 0.05

Say = Callable[[str], None]
Work = Callable[[], object]


@dataclass(frozen=True)
class _Case:
    what: str
    impl: str
    work: Work
    batch: int


def bench_train(
    size: str = "base",
    pixels: int = 224,
    *,
    family: str = "mae_vit",
    patch: int = _PATCH,
    batch: int | None = None,
    device: str | None = None,
    rounds: int = _ROUNDS,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure samples a second and model FLOP utilisation of training step and encoder, theirs and ours in turn.

    Of `mae_vit`: `step` is NEC adaptation with the paper's mask and everything trained (forward, backward, AdamW) and,
    for timm, the forward and backward of a plain ViT on all tokens with AdamW. `encode` is the forward pass on all
    tokens. Both run on timm's blocks, with fused attention where training has it too (`choose_attention`).

    Of `mp_mae`: both are of the encoder alone, on 12 bands: `nec` with 60% of the patches masked, `nec no skip` the
    same with masked places computed and set to 0, `nec dense` and timm's plain ConvNeXt V2 on all of them. timm's has
    a stem of one convolution of patch / 8, so that its stages have as many places as ours.

    float32 on a CPU, bfloat16 autocast on a GPU, there ViTs also compiled.

    Args:
        size: of `nec_ray.models.mae.SIZES`, or of `nec_ray.models.convnext.SIZES`.
        pixels: a side of the input; three bands of mae_vit.
        family: `mae_vit` or `mp_mae`.
        patch: pixels a side; mae_vit is measured with 16.
        batch: tiles a call; 8 on a CPU and 256 on a GPU where it is None.
        device: `cpu` or `cuda`; a GPU where there is one and it is None.
        rounds: of which the median counts; within a round every implementation has its turn.
        say: told what is being done.

    Returns:
        `{"machine": {...}, "rows": [...]}`; the rows' keys are DESIGN.md's. `mfu` is the share of the speed of a large
        matrix product of the same type, measured in the same run (`machine.matmul_tflops`), that the model's
        arithmetic reaches: FLOPs are counted by torch, recomputation and the optimiser not included. Of `mp_mae` they
        are those that each implementation computes.

    Raises:
        InputError: a family, size, patch or device that is not there.
    """
    families = {"mae_vit": (SIZES, (_PATCH,)), "mp_mae": (CONVNEXT_SIZES, PATCHES)}
    if family not in families:
        raise InputError(f"{family}: no family; there are {', '.join(families)}")
    sizes, patches = families[family]
    if size not in sizes:
        raise InputError(f"{size}: no size; there are {', '.join(sizes)}")
    if patch not in patches:
        raise InputError(f"patch {patch}: {family} is measured with {', '.join(map(str, patches))}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in _MATMUL or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"{device}: no such device here; use cpu{', or cuda' * torch.cuda.is_available()}")
    batch = batch or (256 if device == "cuda" else 8)
    say(f"measuring a matrix product on the {device}")
    peak = _matmul_flops(device)
    if family == "mae_vit":
        cases, name = list(_cases(size, pixels, batch, device)), f"ViT-{size}/{_PATCH} {pixels} px"
    else:
        cases = list(_convnext_cases(size, pixels, patch, batch, device))
        name = f"ConvNeXtV2-{size}/{patch} {pixels} px"
    rows = []
    for what in ("encode", "step"):
        mine = [case for case in cases if case.what == what]
        say(f"{what}: {', '.join(case.impl for case in mine)}")
        flops = {case.impl: _flops(case.work) / case.batch for case in mine if "compiled" not in case.impl}
        found = _in_turn([case.work for case in mine], device, rounds)
        for case, seconds in zip(mine, found, strict=True):
            rate = case.batch / seconds
            cost = flops[case.impl.removesuffix(" compiled")]
            rows.append(
                {
                    "model": name,
                    "device": device,
                    "what": what,
                    "impl": case.impl,
                    "samples_s": round(rate, 2),
                    "mfu": round(rate * cost / peak, 3),
                }
            )
    facts = {"device": _device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"batch": batch, "precision": "bfloat16" if device == "cuda" else "float32"}
    return {"machine": machine() | facts | {"matmul_tflops": round(peak / 1e12, 3)}, "rows": rows}


def _convnext_cases(size: str, pixels: int, patch: int, batch: int, device: str) -> Iterator[_Case]:
    config = ConvNextConfig(size=pixels, patch=patch, bands=_BANDS, **CONVNEXT_SIZES[size])
    inputs = torch.randn(batch, _BANDS, pixels, pixels, device=device)
    keep = random_keep(batch, config.tokens, MASK_RATIO, torch.Generator(device).manual_seed(0), inputs.device)
    ours = ConvNextEncoder(config).to(device)
    all_places = ConvNextEncoder(config, skip=False).to(device)
    theirs = timm.models.convnext.ConvNeXt(
        in_chans=_BANDS,
        num_classes=0,
        patch_size=patch // 8,
        depths=config.depths,
        dims=config.dims,
        use_grn=True,
        ls_init_value=None,
    ).to(device)
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "nec": (ours, lambda: ours(inputs, keep)[-1]),
        "nec no skip": (all_places, lambda: all_places(inputs, keep)[-1]),
        "nec dense": (ours, lambda: ours(inputs)[-1]),
        "timm": (theirs, lambda: theirs.forward_features(inputs)),
    }

    def encode(forward: Callable[[], Tensor]) -> Work:
        def work() -> Tensor:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                return forward()

        return work

    def step(model: nn.Module, forward: Callable[[], Tensor]) -> Work:
        optimiser = torch.optim.AdamW(parameter_groups(model, _DECAY), lr=_LR)

        def work() -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss: Any = forward().float().square().mean()
            loss.backward()
            optimiser.step()

        return work

    for impl, (model, forward) in forwards.items():
        yield _Case("encode", impl, encode(forward), batch)
        yield _Case("step", impl, step(model, forward), batch)


def _cases(size: str, pixels: int, batch: int, device: str) -> Iterator[_Case]:
    sizes = SIZES[size]
    inputs = torch.randn(batch, 3, pixels, pixels, device=device)
    precision = "bfloat16" if device == "cuda" else "float32"
    config = MaeConfig(size=pixels, patch=_PATCH, bands=3, **sizes)
    ours, trained = (NeuralEmbeddingCompressor.mae(config).to(device) for _ in range(2))
    set_trainable(trained, "all")
    choose_attention(trained, config.tokens, inputs.device)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=pixels,
        patch_size=_PATCH,
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        num_classes=0,
        global_pool="",
    ).to(device)

    def encode(model: nn.Module) -> Work:
        def work() -> Tensor:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                out: Tensor = model(inputs)
                return out

        return work

    def step_of_ours() -> Work:
        optimiser = torch.optim.AdamW(parameter_groups(trained, 0.05), lr=1e-4, fused=True)
        generator = torch.Generator(device).manual_seed(0)

        def work() -> None:
            optimiser.zero_grad(set_to_none=True)
            gradients(trained, inputs, mask_ratio=_MASK, beta=0.01, generator=generator, precision=precision)
            optimiser.step()

        return work

    def step_of_theirs() -> Work:
        optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

        def work() -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = theirs(inputs).float().square().mean()
            loss.backward()
            optimiser.step()

        return work

    yield _Case("encode", "nec", encode(ours.encoder), batch)
    yield _Case("encode", "timm", encode(theirs), batch)
    if device == "cuda":
        yield _Case("encode", "nec compiled", encode(_compiled(ours.encoder)), batch)
        yield _Case("encode", "timm compiled", encode(_compiled(theirs)), batch)
    yield _Case("step", "nec", step_of_ours(), batch)
    yield _Case("step", "timm", step_of_theirs(), batch)


def _compiled(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def _in_turn(works: Sequence[Work], device: str, rounds: int) -> list[float]:
    """Median seconds of a call of each; within a round they take turns, so that all meet the same load."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(rounds):
        for work, seconds in zip(works, times, strict=True):
            _wait(device)
            started, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - started < _SECONDS / rounds:
                work()
                calls += 1
                _wait(device)
            seconds.append((time.perf_counter() - started) / calls)
    return [statistics.median(seconds) for seconds in times]


def _flops(work: Work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _matmul_flops(device: str) -> float:
    """FLOP/s of a large square matrix product in the type that the models compute in."""
    side = _MATMUL[device]
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    one, two = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    seconds = _in_turn([lambda: one @ two], device, _ROUNDS)[0]
    return 2 * side**3 / seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"]
