"""A small GPT-2 trained by Hugging Face's Trainer, with its checkpoints in a store. Kill it, and start it again.

python examples/transformers_gpt2.py --store ./ckpts
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import ckptstore
from ckptstore.integrations.transformers import CkptstoreCallback

WINDOW = 64


def windows(text: str) -> list[dict[str, torch.Tensor]]:
    """What a language model of characters is trained on; the model moves the labels by one itself."""
    numbers = torch.tensor([ord(letter) % 128 for letter in text])
    rows = numbers[: len(numbers) // WINDOW * WINDOW].view(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="./ckpts")
    parser.add_argument("--run", default="transformers-gpt2")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--background", action="store_true", help="save in the background")
    options = parser.parse_args()

    set_seed(1)
    data = windows(options.text.read_text(encoding="utf-8"))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=WINDOW, n_embd=48, n_layer=2, n_head=4))
    args = TrainingArguments(
        output_dir="out",
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=10,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=10,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = CkptstoreCallback(ckptstore.Store(options.store).run(options.run), background=options.background)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.restore(args))
    print(f"finished at step {trainer.state.global_step}, loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
