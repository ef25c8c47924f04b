"""What the model workers are told of the settings."""

from pathlib import Path

from config.settings import load
from workers.pool.plan import worker_configs


def test_one_adapter_is_merged_and_the_named_ones_are_kept_apart():
    settings = load({"only_cpu": "true", "base_model": "~/m", "lora_model": '["~/merged", "law=~/law", "art=org/art"]'})
    (config,) = worker_configs(settings)
    home = Path.home()
    assert (config.base_model, config.lora_model) == (f"{home}/m", f"{home}/merged")
    assert config.adapters == {"law": f"{home}/law", "art": "org/art"}


def test_each_gpu_has_a_worker_that_sees_no_other():
    configs = worker_configs(load({"gpus": "0,3"}))
    assert [(config.device, config.visible_devices) for config in configs] == [("cuda:0", "0"), ("cuda:0", "3")]
    (on_cpu,) = worker_configs(load({"gpus": "0,3", "only_cpu": "true"}))
    assert (on_cpu.device, on_cpu.visible_devices) == ("cpu", "")
