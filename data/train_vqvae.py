"""Train a VQ-VAE on a folder of videos: `python data/train_vqvae.py VIDEOS OUT`."""

from __future__ import annotations

import sys

from longreel.data.command_line import run_command
from longreel.data.vqvae_training import VQVAETrainConfig, train_vqvae


def main(config: VQVAETrainConfig) -> None:
    """Train, and say how to use the result."""
    train_vqvae(config)
    print(f"use it: python data/prepare.py VIDEOS CAPTIONS OUT --autoencoder vqvae --autoencoder-path {config.out}")


if __name__ == "__main__":
    sys.exit(run_command(main, VQVAETrainConfig, sys.argv[1:]))
