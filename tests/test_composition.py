"""Steering beside the user's own patching, ablation and caching hooks, the cache's methods, and a spliced SAE.

Hooks at one point act in the order in which they were added; a steering hook is one among them.
"""

import contextlib
import warnings

import pytest
import torch
from conftest import as_lens, has_hooked, tiny_llama
from torch import nn

import caa_lens as caa

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def tokens(model):
    return torch.tensor([caa.ChatTemplate().encode(model.tokenizer, "What is it?", "Fine.").ids])


def logits(model, tokens, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks))


def seen_at(model, tokens, name, hooks=()):
    found = []
    logits(model, tokens, [*hooks, (name, lambda x, hook: found.append(x.clone()))])
    return found[0]


def patching(new, position):
    def patch_hook(x, hook):
        x = x.clone()
        x[:, position] = new
        return x

    return (RESID, patch_hook)


def test_a_users_patch_acts_before_or_after_steering_as_it_was_added(model, vectors, tokens):
    v, new = vectors[1], torch.randn(48, generator=torch.Generator().manual_seed(0))
    mine = patching(new, -1)
    plain = seen_at(model, tokens, RESID)
    steer = caa.steering_hooks(model, v, positions="all")
    for hooks, last in (([mine, *steer], new + v.tensor), ([*steer, mine], new)):
        found = seen_at(model, tokens, RESID, hooks)
        torch.testing.assert_close(found[0, -1], last, **CLOSE)
        torch.testing.assert_close(found[:, :-1], plain[:, :-1] + v.tensor, **CLOSE)
    with model.hooks(fwd_hooks=[mine]), caa.steer(model, v, positions="all"):
        patched_first = logits(model, tokens)
    with caa.steer(model, v, positions="all"):
        steered_first = logits(model, tokens, [mine])
    assert torch.equal(patched_first, logits(model, tokens, [mine, *steer]))
    assert torch.equal(steered_first, logits(model, tokens, [*steer, mine]))
    assert not torch.allclose(patched_first, steered_first)


def test_patching_from_a_steered_run_restores_it(model, vectors, tokens):
    """The steered run's cache put into the plain run, by the user's own hook, gives the steered logits."""
    with caa.steer(model, vectors[1], positions="all"), torch.no_grad():
        steered, cache = model.run_with_cache(tokens)
    source = cache[RESID].reshape(1, tokens.shape[1], 48)
    torch.testing.assert_close(logits(model, tokens, [patching(source, slice(None))]), steered, **CLOSE)


def test_ablating_a_component_under_steering(model, vectors, tokens):
    """Zero-ablation of a later MLP under steering = both hooks in one run; it sees the steered stream."""

    def ablate_hook(x, hook):
        return torch.zeros_like(x)

    ablation = ("blocks.2.hook_mlp_out", ablate_hook)
    with caa.steer(model, 2 * vectors[1], positions="all"):
        both = logits(model, tokens, [ablation])
        mlp = seen_at(model, tokens, "blocks.2.hook_mlp_out")
        stream = seen_at(model, tokens, "blocks.2.hook_resid_post", [ablation])
        whole = seen_at(model, tokens, "blocks.2.hook_resid_post")
    torch.testing.assert_close(whole - stream, mlp, **CLOSE)
    by_hand = [(RESID, lambda x, hook: x + 2 * vectors[1].tensor), ablation]
    torch.testing.assert_close(both, logits(model, tokens, by_hand), **CLOSE)
    assert not torch.allclose(both, logits(model, tokens, [ablation]))


def test_the_caches_methods_see_the_steered_stream(model, vectors, tokens):
    with caa.steer(model, vectors[1], positions="all"), torch.no_grad():
        steered, cache = model.run_with_cache(tokens)
    streams, labels = cache.accumulated_resid(layer=3, incl_mid=False, return_labels=True)
    torch.testing.assert_close(streams[-1], cache["blocks.2.hook_resid_post"].reshape(streams[-1].shape), **CLOSE)
    assert labels[2] == "2_pre"
    torch.testing.assert_close(streams[2], cache[RESID].reshape(streams[2].shape), **CLOSE)
    # What attention and MLPs wrote, and the embedding, is everything but the vector.
    parts = cache.decompose_resid(layer=2).sum(0)
    torch.testing.assert_close(streams[2] - parts, vectors[1].tensor.expand_as(parts), **CLOSE)
    # This model's final norm has a gain of one, which logit_attrs leaves out.
    attribution = cache.logit_attrs(streams[-1:, ..., -1, :], tokens=torch.tensor([7]), pos_slice=-1)
    torch.testing.assert_close(attribution.flatten(), steered[0, -1, 7:8], atol=1e-4, rtol=1e-4)


def test_transformerlens_patching_runs_under_steering(model, vectors, tokens):
    """Its activation patching inside a context patches the steered run."""
    from transformer_lens import patching as lens

    other = tokens.clone()
    other[0, 30] += 1
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)

    def metric(out):
        return out[0, -1, 5] - out[0, -1, 6]

    with caa.steer(model, vectors[0], positions="all"), torch.no_grad():
        found = lens.get_act_patch_resid_pre(model, other, clean, metric)
    steering = (vectors[0].hook_name, lambda x, hook: x + vectors[0].tensor)
    for layer, position in ((0, 30), (1, 30), (2, 33)):
        source = clean[f"blocks.{layer}.hook_resid_pre"].reshape(1, -1, 48)[:, position]

        def put_hook(x, hook, position=position, source=source):
            x = x.clone()
            x[:, position] = source
            return x

        expected = metric(logits(model, other, [steering, (f"blocks.{layer}.hook_resid_pre", put_hook)]))
        assert float(found[layer, position]) == pytest.approx(float(expected), abs=1e-5)


def test_reconstruction_with_error_at_the_same_hook(model, vectors, tokens):
    """A hook that swaps the stream for an autoencoder's reconstruction, before or after steering."""
    weights = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) / 7

    def reconstruct(x):
        return torch.relu(x @ weights) @ weights.T

    v = vectors[1].tensor
    plain = seen_at(model, tokens, RESID)
    splice = (RESID, lambda x, hook: reconstruct(x))
    with_error = (RESID, lambda x, hook: reconstruct(x) + (x - reconstruct(x)).detach())
    steer = caa.steering_hooks(model, vectors[1], positions="all")
    for hooks, expected in (
        ([splice, *steer], reconstruct(plain) + v),
        ([*steer, splice], reconstruct(plain + v)),
        ([*steer, with_error], plain + v),
    ):
        torch.testing.assert_close(seen_at(model, tokens, RESID, hooks), expected, **CLOSE)


@pytest.fixture
def spliced(byte_tokenizer):
    """A HookedTransformer, and a context that splices a random SAE in at `RESID`: SAELens', or one that does the same."""
    if not has_hooked():
        pytest.skip("SAELens splices SAEs into a HookedTransformer")
    model = as_lens("hooked", tiny_llama(len(byte_tokenizer)), byte_tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import sae_lens
    except ImportError:
        return model, lambda: _splice(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = sae_lens.HookedSAETransformer(model.cfg, tokenizer=model.tokenizer)
    host.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(0)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=48, d_sae=96, device="cpu"))
    sae.cfg.metadata.hook_name = RESID
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) / 10)
    return host.eval(), lambda: host.saes(saes=[sae])


class _Reconstruction(nn.Module):
    """Stands in the place of a hook point, with hook points of its own, as SAELens' wrapper does."""

    def __init__(self):
        from transformer_lens.hook_points import HookPoint

        super().__init__()
        self.weights = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) / 7
        self.hook_sae_input, self.hook_sae_output = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_sae_output(torch.relu(self.hook_sae_input(x) @ self.weights) @ self.weights.T)


@contextlib.contextmanager
def _splice(model):
    from transformer_lens.hook_points import HookPoint

    model.acts_to_saes = {}
    model.blocks[1].hook_resid_post = _Reconstruction()
    model.setup()
    try:
        yield model
    finally:
        model.blocks[1].hook_resid_post = HookPoint()
        model.setup()


def test_steering_at_a_spliced_sae_acts_on_what_it_gives_out(spliced, pairs, tokens):
    model, splice = spliced
    vectors = caa.extract(model, pairs, progress=False)
    v = 2 * vectors[1]
    plain = logits(model, tokens)
    with splice():
        through_sae = logits(model, tokens)
        assert not torch.allclose(through_sae, plain)
        given = seen_at(model, tokens, f"{RESID}.hook_sae_output")
        with caa.steer(model, v, positions="all"):
            after = seen_at(model, tokens, "blocks.2.hook_resid_pre")
            steered = logits(model, tokens)
        torch.testing.assert_close(after, given + v.tensor, **CLOSE)
        by_hand = (f"{RESID}.hook_sae_output", lambda x, hook: x + v.tensor)
        torch.testing.assert_close(steered, logits(model, tokens, [by_hand]), **CLOSE)
        assert torch.equal(logits(model, tokens), through_sae)
    assert torch.equal(logits(model, tokens), plain)


def test_splicing_inside_steer_is_refused_not_silently_unsteered(spliced, pairs, tokens):
    model, splice = spliced
    vectors = caa.extract(model, pairs, progress=False)
    plain = logits(model, tokens)
    with caa.steer(model, vectors[1], positions="all"):
        steered = logits(model, tokens)
        with splice(), pytest.raises(caa.InputError, match="splice it in first and enter steer"):
            logits(model, tokens)
    assert torch.equal(logits(model, tokens), plain)
    with caa.steer(model, vectors[0], positions="all"), splice():
        logits(model, tokens)  # another layer's splice takes nothing away
    assert not torch.equal(steered, plain)
