"""How large everything is: the full reproduction, and a toy one that only shows that it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """One run of the optimizer.

    Attributes:
        steps: Number of batches.
        rate: Highest learning rate.

    """

    steps: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """Sizes, lengths and the grid of merges.

    Attributes:
        widths: Hidden sizes of the three decoders, the smallest first.
        encoder_width: Hidden size of the encoder.
        layers: Transformer blocks of every model.
        decoder_base: Pre-training of the decoders' base models.
        encoder_base: Pre-training of the encoder's.
        tuned: Supervised fine-tuning of every model.
        pretrained_on: What makes large deltas.
        gently: Fine-tuning that moves a weight by about a unit in the last place of bfloat16.
        batch: Items in a batch.
        test_items: Held-out items that a score is the mean over.
        drop_rates: The paper's p; 0 is the fine-tuned model itself.
        seeds: Of the masks.
        densities: 1 - p in merges of several models.
        scalings: Factors of the merged delta.
        weights: Of each gently fine-tuned model in merges that are rounded.
        drop_rates_rounded: The paper's p in those.
        reinforced: Fine-tuning by reinforcement, which changes about a fifth of the weights.
        densities_reinforced: 1 - p in merges of such models.
        weights_reinforced: Of each such model.
        seed: Of data and weights.

    """

    widths: tuple[int, int, int] = (32, 64, 128)
    encoder_width: int = 64
    layers: int = 2
    decoder_base: Training = Training(1200, 2e-3)
    encoder_base: Training = Training(800, 1e-3)
    tuned: Training = Training(100, 1e-4)
    pretrained_on: Training = Training(600, 3e-3)
    gently: Training = Training(100, 1e-5)
    batch: int = 128
    test_items: int = 2000
    drop_rates: tuple[float, ...] = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    seeds: tuple[int, ...] = (1, 2, 3)
    densities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.9)
    scalings: tuple[float, ...] = (0.5, 1.0)
    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    drop_rates_rounded: tuple[float, ...] = (0, 0.5)
    reinforced: Training = Training(40, 2e-6)
    densities_reinforced: tuple[float, ...] = (0.5, 0.2, 0.1)
    weights_reinforced: tuple[float, ...] = (0.33, 0.5, 1.0)
    seed: int = 20231106


FULL = Settings()
TOY = Settings(
    widths=(8, 16, 24),
    encoder_width=16,
    decoder_base=Training(3, 2e-3),
    encoder_base=Training(3, 1e-3),
    tuned=Training(2, 1e-4),
    pretrained_on=Training(2, 3e-3),
    gently=Training(2, 1e-5),
    batch=8,
    test_items=20,
    drop_rates=(0, 0.9),
    seeds=(1, 2),
    densities=(0.5,),
    scalings=(1.0,),
    weights=(0.3,),
    drop_rates_rounded=(0,),
    reinforced=Training(2, 1e-4),
    densities_reinforced=(0.5,),
    weights_reinforced=(0.5, 1.0),
)
