"""The published recipes and the sample run, each a function that returns a `Config`.

The published ones have batch 4096 (FAIR's CONFIG.md); a smaller `--batch-size` scales the learning rate with it.
"""

from collections.abc import Callable

from trainer.config import Config, Data, Model, Optim, Run


def demo() -> Config:
    """A small conv-stem ViT on the generated sample images, on a laptop's CPU.

    Command: make train
    Published: none; the README has the k-NN accuracy and the time measured.
    """
    return Config(
        data=Data(image_size=64, crop_min=0.2),
        model=Model(
            arch="vit_conv_small",
            embed_dim=128,
            depth=2,
            num_heads=4,
            moco_dim=128,
            moco_mlp_dim=512,
            moco_t=0.2,
            moco_m=0.97,
            moco_m_cos=True,
        ),
        optim=Optim(epochs=15, batch_size=64, optimizer="adamw", lr=8e-3, weight_decay=0.05, warmup_epochs=2),
        run=Run(log_every=10),
    )


def r50_100ep() -> Config:
    """ResNet-50, 100 epochs.

    Command: torchrun --standalone --nproc-per-node=8 train_ddp.py r50-100ep --data DIR --out RUN
    Published: 68.9 % linear top-1 on ImageNet. Cost: not yet measured.
    """
    return _resnet50(epochs=100, lr=0.6, weight_decay=1e-6, moco_m=0.99)


def r50_300ep() -> Config:
    """ResNet-50, 300 epochs.

    Command: torchrun --standalone --nproc-per-node=8 train_ddp.py r50-300ep --data DIR --out RUN
    Published: 72.8 % linear top-1 on ImageNet. Cost: not yet measured.
    """
    return _resnet50(epochs=300, lr=0.3, weight_decay=1e-6, moco_m=0.99)


def r50_1000ep() -> Config:
    """ResNet-50, 1000 epochs.

    Command: torchrun --standalone --nproc-per-node=8 train_ddp.py r50-1000ep --data DIR --out RUN
    Published: 74.6 % linear top-1 on ImageNet. Cost: not yet measured.
    """
    return _resnet50(epochs=1000, lr=0.3, weight_decay=1.5e-6, moco_m=0.996)


def vit_s_300ep() -> Config:
    """ViT-S/16 with 12 heads, 300 epochs.

    Command: torchrun --standalone --nproc-per-node=8 train_ddp.py vit-s-300ep --data DIR --out RUN
    Published: 73.2 % linear top-1 on ImageNet, 81.4 % fine-tuned. Cost: not yet measured.
    """
    return _vit("vit_small")


def vit_b_300ep() -> Config:
    """ViT-B/16, 300 epochs.

    Command: torchrun --standalone --nproc-per-node=8 train_ddp.py vit-b-300ep --data DIR --out RUN
    Published: 76.7 % linear top-1 on ImageNet, 83.2 % fine-tuned. Cost: not yet measured.
    """
    return _vit("vit_base")


def _resnet50(epochs: int, lr: float, weight_decay: float, moco_m: float) -> Config:
    return Config(
        data=Data(crop_min=0.2),
        model=Model(arch="resnet50", moco_m=moco_m, moco_m_cos=True),
        optim=Optim(epochs=epochs, lr=lr, weight_decay=weight_decay),
    )


def _vit(arch: str) -> Config:
    return Config(
        model=Model(arch=arch, moco_t=0.2, moco_m_cos=True, stop_grad_conv1=True),
        optim=Optim(epochs=300, optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40),
    )


DEFAULT = "vit-s-300ep"
PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (demo, r50_100ep, r50_300ep, r50_1000ep, vit_s_300ep, vit_b_300ep)
}


def overview() -> str:
    """A line a preset, for --help."""
    lines = [f"  {name}: {(preset.__doc__ or '').splitlines()[0]}" for name, preset in PRESETS.items()]
    return "\n".join(["Presets:", *lines])
