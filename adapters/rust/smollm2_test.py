"""The same model file in Rust and in NumPy must give the same greedy tokens.

./dev test gives the paths: SMOLLM2_WEIGHTS is the GGUF file, SMOLLM2_RUST the Rust example.
"""

import ast
import importlib.util
import os
import subprocess
from pathlib import Path

WEIGHTS = Path(os.environ["SMOLLM2_WEIGHTS"])
PROMPT = "Name 3 colours."
TOKENS = 24


def numpy_example():
    path = Path(__file__).parents[1] / "python/examples/smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_tokens():
    done = subprocess.run(
        [os.environ["SMOLLM2_RUST"], WEIGHTS, PROMPT, str(TOKENS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens = ast.literal_eval(done.stderr.splitlines()[-1])

    example = numpy_example()
    model = example.Model(WEIGHTS)
    run = example.Run(model, example.plugin_attention, model.encode(PROMPT), TOKENS)
    for _ in run:
        pass
    assert tokens == run.tokens
    assert done.stdout.rstrip("\n") == model.tokenizer.decode(tokens)
