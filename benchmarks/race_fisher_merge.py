"""Fisher diagonals against loops, nngeometry and BackPACK; merging on disk against copying the same bytes and mergekit.

The diagonal is exact over classes, of the paper's kind of small CNN on 1,024 images of 10 classes. Peers: one backward
pass for each example and class (the definition), BackPACK's DiagGGNExact (for cross-entropy the same matrix) and a loop
over classes with its BatchGrad, and nngeometry's PMatDiag.

Merging: two models of 2 GB in shards on disk. A plain copy of the same bytes reads and writes what is read here, both
models; as a merge writes only one, a copy of one model is shown too. Both are flushed to disk. Peak memory is that of
a fresh process from its start to its end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _timer import figure, main, missing, peak_mib, race
from gradmatch.core.state_dicts import Spec, open_state_dict, write_state_dict
from gradmatch.core.store import write_json
from gradmatch.weights import fisher_diagonal, merge

N, CLASSES = 1024, 10


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    ).eval()  # fmt: skip


def images() -> Tensor:
    return torch.randn(N, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def ours(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return fisher_diagonal(net, (x, torch.zeros(len(x))), batch_size=256)


def single(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The definition."""
    params = dict(net.named_parameters())
    total = {k: torch.zeros_like(p) for k, p in params.items()}
    for i in range(len(x)):
        logp = torch.log_softmax(net(x[i : i + 1]), 1)[0]
        p = logp.detach().exp()
        for c in range(CLASSES):
            grads = torch.autograd.grad(logp[c], list(params.values()), retain_graph=c + 1 < CLASSES)
            for k, g in zip(total, grads, strict=True):
                total[k].add_(g.square(), alpha=float(p[c]) / len(x))
    return total


def backpack_ggn(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    model, loss = extend(net), extend(nn.CrossEntropyLoss(reduction="sum"))
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for part in x.split(256):
        with backpack(DiagGGNExact()):
            loss(model(part), torch.zeros(len(part), dtype=torch.long)).backward()
        for k, p in net.named_parameters():
            total[k] += p.diag_ggn_exact / len(x)
            p.grad = None
    return total


def backpack_batch(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss = extend(net), extend(nn.CrossEntropyLoss(reduction="sum"))
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for part in x.split(256):
        for c in range(CLASSES):
            with backpack(BatchGrad()):
                logits = model(part)
                loss(logits, torch.full((len(part),), c)).backward()
            weight = torch.softmax(logits.detach(), 1)[:, c]
            for k, p in net.named_parameters():
                total[k] += torch.einsum("m,m...->...", weight, p.grad_batch.square()) / len(x)
                p.grad = None
    return total


def nngeometry(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=256)
    found = FIM(model=net, loader=loader, representation=PMatDiag, variant="classif_logits", device="cpu")
    flat = found.get_diag()
    total, place = {}, 0
    for layer in [m for m in net if hasattr(m, "weight")]:
        for name in ("weight", "bias"):
            p = getattr(layer, name)
            key = next(k for k, q in net.named_parameters() if q is p)
            total[key] = flat[place : place + p.numel()].view_as(p)
            place += p.numel()
    return total


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for k in a:
        error = float((a[k] - b[k]).abs().max() / a[k].abs().max())
        assert error < 1e-4, f"{k} differs by {error:.1e} of its largest entry"


def fishers() -> None:
    net, x = cnn(), images()
    race(f"Fisher diagonal, {N} images, {CLASSES} classes", lambda: ours(net, x), lambda: single(net, x),
         peer="single-example backwards", rounds=3, warmup=0, check=same, target=3.0)  # fmt: skip
    peers = [
        ("BackPACK DiagGGNExact", "backpack", backpack_ggn),
        ("BackPACK BatchGrad per class", "backpack", backpack_batch),
        ("nngeometry PMatDiag", "nngeometry", nngeometry),
    ]
    for name, module, work in peers:
        if find_spec(module) is None:
            missing(name, f"{module} is not installed")
            continue
        their_net = cnn()
        race(f"Fisher diagonal, {N} images, {CLASSES} classes", lambda: ours(net, x),
             lambda work=work, net=their_net: work(net, x), peer=name, rounds=5, check=same, target=1.0)  # fmt: skip


# --- merging on disk ---------------------------------------------------------------------------------------


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


def llama() -> dict[str, Spec]:
    """Names and shapes of a Llama of 0.54 billion parameters in single precision, 2.2 GB."""
    d, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], d)}
    for k in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{k}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (wide, d) for n in ("gate", "up")} | {
            f"{at}mlp.down_proj.weight": (d, wide)
        }
        shapes |= {f"{at}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (CONFIG["vocab_size"], d)}
    return {name: Spec(torch.float32, shape) for name, shape in shapes.items()}


def make_model(folder: Path, seed: int) -> None:
    specs, base, own = llama(), torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def values(name: str) -> list[Tensor]:
        shape = specs[name].shape
        return [torch.rand(shape, generator=base).sub_(0.5).add_(torch.rand(shape, generator=own), alpha=0.1)]

    write_state_dict(
        folder, specs, values, shard_bytes=5e8, also=lambda new: write_json(new / "config.json", CONFIG)
    )


def fisher_of(folder: Path, out: Path, seed: int) -> None:
    specs = {k: Spec(torch.float32, s.shape) for k, s in open_state_dict(folder).specs.items()}
    g = torch.Generator().manual_seed(seed)
    write_state_dict(out, specs, lambda name: [torch.rand(specs[name].shape, generator=g)], shard_bytes=5e8)


def size(*folders: Path) -> float:
    return sum(f.stat().st_size for folder in folders for f in folder.iterdir())


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def copied(sources: list[Path], out: Path) -> None:
    for source in sources:
        target = fresh(out / source.name)
        target.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
            handle = os.open(target / file.name, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def merged(models: list[Path], fishers: list[Path] | None, out: Path) -> Path:
    return Path(merge(models, fishers, [0.4, 0.6], out=fresh(out), shard_bytes=5e8))


def right(models: list[Path], out: Path) -> None:
    a, b, c = (open_state_dict(p) for p in (*models, out))
    assert list(c.specs.items()) == list(a.specs.items())
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        wanted = torch.lerp(a.read(name).double(), b.read(name).double(), 0.6)
        assert torch.allclose(c.read(name).double(), wanted, rtol=0, atol=1e-6), name


def right_by_fisher(models: list[Path], fishers: list[Path], out: Path) -> None:
    """The closed form in double precision, of a few tensors."""
    (a, b), (fa, fb), c = ([open_state_dict(p) for p in paths] for paths in (models, fishers, [out]))
    norms = [sum(float(f.read(n).double().square().sum()) for n in f.specs) ** 0.5 for f in (fa, fb)]
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        wa = 0.4 / norms[0] * fa.read(name).double().clamp(min=1e-6)
        wb = 0.6 / norms[1] * fb.read(name).double()
        wanted = (wa * a.read(name).double() + wb * b.read(name).double()) / (wa + wb)
        assert torch.allclose(c[0].read(name).double(), wanted, rtol=0, atol=1e-5), name


def by_mergekit(models: list[Path], out: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    parts = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, (0.4, 0.6), strict=True)]
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": parts, "dtype": "float32"}
    )
    return run_merge(config, str(fresh(out)), MergeOptions(quiet=True))


CHILD = """
import sys
from pathlib import Path
from gradmatch.weights import merge
a, b, out, fa, fb = sys.argv[1:]
merge([a, b], [fa, fb] if fa else None, out=out, shard_bytes=5e8)
print(next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")))
"""


def memory(name: str, models: list[Path], fishers: list[Path] | None, out: Path) -> None:
    """Peak of a fresh process, and what merging takes above what the process held before."""
    given = [str(f) for f in fishers] if fishers else ["", ""]
    words = [sys.executable, "-c", CHILD, *map(str, models), str(fresh(out)), *given]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    tensor = max(s.nbytes for s in open_state_dict(models[0]).specs.values()) / 2**20
    taken = peak_mib(lambda: merged(models, fishers, out))
    total = int(done.stdout) / 1024
    figure(f"{name} of {size(*models) / 1e9:.2f} GB: memory", whole_process_mib=total, limit_mib=700,
           met=total < 700, above_before_mib=taken or 0.0, largest_tensor_mib=tensor,
           tensors=(taken or 0.0) / tensor)  # fmt: skip
    assert total < 700, f"{total} MiB"


def merging(place: Path) -> None:
    models, fishers = [place / "a", place / "b"], [place / "fa", place / "fb"]
    for k, folder in enumerate(models):
        make_model(folder, k + 1)
    print(f"two models of {size(models[0]) / 1e9:.2f} and {size(models[1]) / 1e9:.2f} GB", flush=True)
    memory("average", models, None, place / "m")
    race("average", lambda: merged(models, None, place / "m"), lambda: copied(models, place / "c"),
         peer="plain copy of the bytes read", rounds=3, warmup=0, unit="s", target=1 / 1.3,
         check=lambda out, _: right(models, out))  # fmt: skip
    shutil.rmtree(place / "c")
    race("average", lambda: merged(models, None, place / "m"), lambda: copied(models[:1], place / "c"),
         peer="plain copy of the bytes written", rounds=3, warmup=0, unit="s", target=1 / 1.3,
         check=lambda out, _: right(models, out))  # fmt: skip
    shutil.rmtree(place / "c")
    for k, (folder, out) in enumerate(zip(models, fishers, strict=True)):
        fisher_of(folder, out, k)
    memory("Fisher merge", models, fishers, place / "m")
    race("Fisher merge", lambda: merged(models, fishers, place / "m"), lambda: copied([*models, *fishers], place / "c"),
         peer="plain copy of the bytes read", rounds=1, warmup=0, unit="s", target=1 / 1.3,
         check=lambda out, _: right_by_fisher(models, fishers, out))  # fmt: skip
    shutil.rmtree(place / "c")
    try:
        import mergekit.merge  # noqa: F401
    except ImportError as error:
        missing("mergekit linear", str(error))
    else:
        race("average", lambda: merged(models, None, place / "m"), lambda: by_mergekit(models, place / "k"),
             peer="mergekit linear", rounds=1, warmup=0, unit="s", target=1.0, peak_memory=True,
             check=lambda ours_at, _: right(models, ours_at) or right(models, place / "k"))  # fmt: skip


def run() -> None:
    warnings.simplefilter("ignore")
    fishers()
    with tempfile.TemporaryDirectory() as place:
        merging(Path(place))


if __name__ == "__main__":
    main(run)
