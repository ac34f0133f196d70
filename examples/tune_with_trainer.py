"""PAT in an ordinary transformers.Trainer: python tune_with_trainer.py MODEL TEXT.txt OUT STEPS"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import pyprune

WINDOW = 256
name, text, out, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)


def windows(rows: dict) -> dict:
    ids = [token for row in tokenizer(rows["text"])["input_ids"] for token in row]
    ids = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return {"input_ids": ids, "labels": ids}


data = load_dataset("text", data_files=text, split="train").map(windows, batched=True, remove_columns="text")
data.set_format("torch")

pat = pyprune.PAT(ratio=0.25)
model = pat.prepare(model, calibration=data[:32]["input_ids"].split(4))
arguments = TrainingArguments(out, max_steps=int(steps), learning_rate=1e-3, save_strategy="no", report_to="none")
Trainer(model, arguments, train_dataset=data, callbacks=[pat.callback()]).train()

pat.finalize(model).save_pretrained(f"{out}/model")  # an ordinary checkpoint, smaller
tokenizer.save_pretrained(f"{out}/model")
