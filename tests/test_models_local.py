"""Scores equal the plain way (each prompt alone, all logits, float32) for batches, prefixes, adapters and architectures."""
import numpy as np, pytest, torch, transformers
from clinllm.core.errors import ModelError
from clinllm.core.settings import load_settings
from clinllm.models.language_model import LanguageModel, choice_probability
from clinllm.models.local import LocalModel, tiny_model

NOTES = [f"He lives alone. Creatinine {i}.{i % 7} mg/dL." + " Denies chest pain." * (i % 5) + " Answer:" for i in range(9)]
SHOTS = "History of heart failure and diabetes. Answer: yes\n" * 12
SETS = [[" yes", " no"], [" readmitted", " not readmitted", " no"], ["yes", "yes yes", "yes no no"]]


def plainly(model, prompts, choices):
    "The oracle: sum of log-probabilities from all logits of one pass per prompt and choice"
    def one(p, c):
        a, b = model._encode([p])[0], model.tokenizer(c, add_special_tokens=False).input_ids
        logp = model.model(input_ids=torch.tensor([a + b], device=model.device)).logits.double().log_softmax(-1)[0]
        return sum(logp[len(a) + t - 1, k].item() for t, k in enumerate(b))
    with torch.no_grad(): return np.array([[one(p, c) for c in choices] for p in prompts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder): return LocalModel(folder, precision="float32", device="cpu")


@pytest.mark.parametrize("choices", SETS)
@pytest.mark.parametrize("before", ["", SHOTS])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_equal_the_plain_way(folder, before, choices, batch_size):
    model = LocalModel(folder, batch_size, precision="float32", device="cpu"); prompts = [before + n for n in NOTES]
    np.testing.assert_allclose(model.score(prompts, choices), plainly(model, prompts, choices), atol=2e-5)


def test_order_of_prompts_and_repeats_do_not_matter(model):
    forth, back = model.score(NOTES, SETS[0]), model.score(NOTES[::-1] + NOTES[:1], SETS[0])
    np.testing.assert_allclose(back[:-1][::-1], forth, atol=2e-5); np.testing.assert_allclose(back[-1], forth[0], atol=2e-5)


def test_identical_prompts_use_the_prefix(model):
    "All prompts the same: the shared beginning is everything but the last token"
    np.testing.assert_allclose(model.score([SHOTS + "Answer:"] * 5, SETS[0]), plainly(model, [SHOTS + "Answer:"] * 5, SETS[0]), atol=2e-5)


def other(kind, vocab):
    "Small random models of other architectures, with logits that are not all alike"
    small = dict(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=1)
    torch.manual_seed(0)
    if kind == "gpt2": return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2))
    if kind == "gemma2": return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small, head_dim=8, final_logit_softcapping=5.0, sliding_window=16, max_position_embeddings=512))
    if kind == "gemma3": return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**small, head_dim=8, sliding_window=16, max_position_embeddings=512))
    if kind == "qwen3": return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small, head_dim=8, max_position_embeddings=512))
    return transformers.CohereForCausalLM(transformers.CohereConfig(**small, logit_scale=0.0625, max_position_embeddings=512))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gemma3", "qwen3"])
@pytest.mark.parametrize("before", ["", SHOTS])
def test_other_architectures(model, kind, before):
    "Absolute positions, capped logits and sliding windows are scored rightly, with and without the prefix cache"
    it = LocalModel.from_parts(other(kind, len(model.tokenizer)).eval(), model.tokenizer, kind, precision="float32"); prompts = [before + n for n in NOTES[:5]]
    np.testing.assert_allclose(it.score(prompts, SETS[1]), plainly(it, prompts, SETS[1]), atol=5e-5)


def test_unknown_head_is_refused(model):
    "Cohere scales its logits; an unknown head must be refused, not mis-scored"
    it = LocalModel.from_parts(other("cohere", len(model.tokenizer)).eval(), model.tokenizer, "cohere", precision="float32")
    with pytest.raises(ModelError, match="changes its logits"): it.score(NOTES[:1], SETS[0])


def test_adapter_and_training_mode(folder):
    "A LoRA adapter counts, its dropout does not, and the model is left in training mode"
    import peft
    base = LocalModel(folder, precision="float32", device="cpu"); before = base.score(NOTES, SETS[0])
    torch.manual_seed(0)
    net = peft.get_peft_model(base.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"))
    it = LocalModel.from_parts(net, base.tokenizer, "lora", precision="float32"); net.train()
    after = it.score(NOTES, SETS[0])
    assert net.training and np.abs(after - before).max() > 1e-3
    net.eval(); np.testing.assert_allclose(after, plainly(it, NOTES, SETS[0]), atol=2e-5)
    with net.disable_adapter(): np.testing.assert_allclose(it.score(NOTES, SETS[0]), before, atol=2e-5)
    assert it.fingerprint != base.fingerprint


def test_bfloat16_layers_keep_a_float32_head(folder, model):
    fast = LocalModel(folder, precision="bfloat16", device="cpu")
    with fast._inference(): assert fast._logits(fast._read([[1, 2, 3]])[0]).dtype == torch.float32
    np.testing.assert_allclose(choice_probability(fast.score(NOTES, SETS[0])), choice_probability(model.score(NOTES, SETS[0])), atol=0.03)


def test_contract_and_fingerprint(folder, model, tmp_path):
    assert isinstance(model, LanguageModel)
    assert LocalModel(folder).fingerprint == model.fingerprint != LocalModel(tiny_model(tmp_path, seed=1)).fingerprint
    assert model.score([], ["yes", "no"]).shape == (0, 2) and model.generate([]) == [] and model.embed([]).shape == (0, 32)


def test_too_long_is_named_not_cut(model):
    long = "furosemide " * 600
    with pytest.raises(ModelError, match="row 1 has .* takes 512") as e: model.score(["short", long], ["yes", "no"])
    assert "furosemide" not in str(e.value)
    for call in (lambda: model.generate([long]), lambda: model.embed([long])):
        with pytest.raises(ModelError, match="row 0 has"): call()


def test_empty_prompt_is_named(model):
    with pytest.raises(ModelError, match="row 1 has no tokens"): model.score(["a", ""], ["yes", "no"])


def test_chat_without_system_role(folder):
    it = LocalModel(folder, device="cpu")
    it.tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[{{ m.content }}]{% endfor %}"
    assert it.chat("Be brief.", "Hello") == "[Be brief.\n\nHello]"
    it.tokenizer.chat_template = None
    assert it.chat("Be brief.", "Hello") == "Be brief.\n\nHello\n\nAnswer:"


def test_generation_equals_greedy_by_hand(model):
    "The most probable token, again and again, each time from a fresh pass"
    ids, ends = model._encode([NOTES[0]])[0], model._end_tokens(); tokens = []
    for _ in range(8):
        with torch.no_grad(): token = model.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax().item()
        if token in ends: break
        tokens.append(token)
    got = model.generate([NOTES[3], NOTES[0]], max_tokens=8)[1]
    assert got.tokens == len(tokens) and got.text == model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_sampling_is_seeded(model):
    a, b, c = (model.generate(NOTES[:3], max_tokens=8, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert a == b != c


def test_broken_folder_is_one_clear_error(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path / "m"); (tmp_path / "m" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot open"): LocalModel(tmp_path / "m")


@pytest.mark.slow
def test_default_model_in_float32():
    "The real model: batches and the shared prefix agree with the plain way"
    folder = load_settings().cache / "models" / "smollm2-135m-instruct"
    if not folder.exists(): pytest.skip("the default model is not in the cache; `clinllm model` fetches it")
    it = LocalModel(folder, 4, precision="float32"); prompts = [it.chat("Answer yes or no.", SHOTS + n) for n in NOTES[:5]]
    np.testing.assert_allclose(it.score(prompts, ["yes", "no"]), plainly(it, prompts, ["yes", "no"]), atol=1e-4)
