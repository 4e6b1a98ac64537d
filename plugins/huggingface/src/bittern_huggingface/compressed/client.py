"""The client: a fresh process with transformers and compressed-tensors, and nothing of ours.

Run as a script: ``python client.py CHECKPOINT REQUEST.json ANSWER.json``. The request holds the
probe's token ids (or null) and a dtype; the answer what loading reported and the probe's losses.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Load the checkpoint as a user would and run the probe."""
    checkpoint, request_file, answer_file = sys.argv[1:]
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))

    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    cls = next(
        (c for n in config.architectures or () if (c := getattr(transformers, n, None))),
        transformers.AutoModelForCausalLM,
    )
    model, info = cls.from_pretrained(
        checkpoint,
        dtype=getattr(torch, request["dtype"]),
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model = model.to(device).eval()
    answer = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(k) for k in info["mismatched_keys"]),
        "transformers": transformers.__version__,
        "quantized": getattr(model, "hf_quantizer", None) is not None,
        "nll": None,
    }
    if request["input_ids"] is not None:
        ids = torch.tensor(request["input_ids"], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
        losses = [
            cross_entropy(logits[i, :-1], ids[i, 1:], reduction="none") for i in range(len(ids))
        ]
        answer["nll"] = torch.stack(losses).cpu().tolist()
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
