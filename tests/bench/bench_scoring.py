"""Label scores: clinllm against the plain way with transformers (float32, one prompt at a time, all logits), same prompts, same run.

python tests/bench/bench_scoring.py [n]     prints notes per second and the ratio, and by how much the probabilities differ
"""
import sys, time
import numpy as np, torch
from clinllm.core.settings import load_settings
from clinllm.models.default import fetch_default_model
from clinllm.models.language_model import choice_probability
from clinllm.models.local import LocalModel

SENTENCES = ["He lives alone and missed his last two appointments.", "Denies chest pain and palpitations.", "Creatinine 1.8 mg/dL, potassium 4.4 mmol/L.", "Discharge medication: furosemide 40 mg daily.",
             "Her daughter visits every day and helps with meals.", "History of heart failure with reduced ejection fraction.", "Walks with a frame; fell once in the spring.", "Follow-up in clinic within seven days is planned."]
SHOT = "Discharge summary: " + " ".join(SENTENCES) + "\nWill the patient be readmitted within 30 days? Answer: no\n\n"


def notes(n, seed=0):
    "Notes of about 200 tokens and uneven length"
    rng = np.random.default_rng(seed)
    return ["Discharge summary: " + " ".join(rng.choice(SENTENCES, rng.integers(10, 22))) + "\nWill the patient be readmitted within 30 days? Answer:" for _ in range(n)]


def plain(model, prompts, choices):
    "The usual loop: all logits of each prompt in float32"
    ids = [model.tokenizer(c, add_special_tokens=False).input_ids[0] for c in choices]
    with torch.no_grad(): return np.array([model.model(**model.tokenizer(p, return_tensors="pt")).logits[0, -1].log_softmax(-1)[ids].tolist() for p in prompts])


def timed(f, *args):
    start = time.perf_counter(); return f(*args), time.perf_counter() - start


def main(n=24):
    folder, choices = fetch_default_model(load_settings().cache), [" yes", " no"]
    fast, exact = LocalModel(folder), LocalModel(folder, precision="float32")
    for what, prompts in [("zero-shot, ~200 tokens", notes(n)), ("4 shots in front", [SHOT * 4 + p for p in notes(n // 2)])]:
        for m in (fast, exact): m.score(prompts[:3], choices)
        plain(exact, prompts[:1], choices)
        tokens = np.mean([fast.count_tokens(p) for p in prompts])
        base, t0 = timed(plain, exact, prompts, choices)
        for name, m in [(f"auto ({fast.precision})", fast), ("float32", exact)]:
            got, t = timed(m.score, prompts, choices)
            moved = np.abs(choice_probability(got) - choice_probability(base)).max()
            print(f"{what}, {tokens:.0f} tokens: {name} {len(prompts) / t:.1f} notes/s, plain {len(prompts) / t0:.1f}; {t0 / t:.1f} times as fast; largest difference of a probability {moved:.1e}")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
