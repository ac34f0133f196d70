"""PAT in TRL's SFTTrainer: python tune_with_sft_trainer.py MODEL CHATS.jsonl OUT STEPS

A row of CHATS is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pyprune

name, chats, out, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
data = load_dataset("json", data_files=chats, split="train")

pat = pyprune.PAT(ratio=0.25)
rendered = tokenizer.apply_chat_template(data[:32]["messages"], tokenize=False)
calibration = [tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids for text in rendered]
model = pat.prepare(model, calibration)
config = SFTConfig(
    out, max_steps=int(steps), learning_rate=1e-3, save_strategy="no", report_to="none", bf16=torch.cuda.is_available()
)
SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[pat.callback()]).train()

pat.finalize(model).save_pretrained(f"{out}/model")  # an ordinary checkpoint, smaller
tokenizer.save_pretrained(f"{out}/model")
