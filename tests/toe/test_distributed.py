"""Two processes over gloo."""

import json
import os
import subprocess
import sys

import pytest


SCRIPT = """
import json
import os
import sys

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_efficient import ToECallback

torch.set_num_threads(1)
torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=4
))
items = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(16)]
args = TrainingArguments(
    output_dir=sys.argv[1], per_device_train_batch_size=2, max_steps=6, logging_steps=1, save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, gradient_accumulation_steps=2,
    ddp_backend="gloo", activation_checkpointing="checkpointing" in sys.argv[2:],
)
assert args.world_size == 2, args.world_size
rows = []
model.vit.layers[1].register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
trainer = Trainer(model, args, train_dataset=items, callbacks=[ToECallback()])
trainer.train()
assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
flat = torch.cat([value.flatten() for value in model.state_dict().values()])
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(*both), "the processes have drifted apart"
assert not any(module._forward_pre_hooks for module in model.modules())
if torch.distributed.get_rank() == 0:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    stages = [entry["toe_stage"] for entry in logs]
    json.dump({"rows": rows, "stages": stages}, open(sys.argv[1] + "/result.json", "w"))
torch.distributed.destroy_process_group()
os._exit(0)  # DistributedDataParallel holds gloo's threads, and those may abort while the interpreter ends
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("checkpointing",)], ids=["plain", "checkpointing"])
def test_two_processes_stay_in_step(options, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, str(script), str(tmp_path), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        errors = process.communicate(timeout=500)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its two children, which a kill would leave behind
        process.communicate()
        raise
    assert process.returncode == 0, errors[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["stages"] == [1, 1, 2, 2, 3, 3]
    assert [count for count in result["rows"] if count] == [33] * 4 + [49] * 4 + [65] * 4
