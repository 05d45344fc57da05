"""
A first adapter: share softmax in the top half of a small model, compensate, save, reload, generate.

    python examples/first_adapter.py [CHECKPOINT]

The default checkpoint is SmolLM2-135M-Instruct, the text Python's own reference manual. Takes seconds on a GPU, a
minute or two on a CPU, and leaves a folder `first-adapter`.
"""

import sys
from pydoc_data.topics import topics

from peft import AutoPeftModelForCausalLM, get_peft_model

from peft_uniattn import UniAttnConfig, calibrate  # importing it is what lets PEFT load the adapter
from peft_uniattn.quickstart.checkpoint import load_checkpoint

checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
base, tokenizer, _ = load_checkpoint(checkpoint, device="auto")  # a GPU if there is one
model = get_peft_model(base, UniAttnConfig(task_type="CAUSAL_LM", r=16))
model.print_trainable_parameters()

texts = [text for text in topics.values() if len(text) > 1000][:48]
options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 256}
calibrate(model, [tokenizer(texts[first : first + 8], **options) for first in range(0, len(texts), 8)])
model.save_pretrained("first-adapter")

model = AutoPeftModelForCausalLM.from_pretrained("first-adapter").to(base.device)
prompt = tokenizer("In Python, the for statement is used to", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]))
