"""RQ-VAE: its loss by definition, what fitting brings, what odd inputs give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import repeated_indices

from genrec_ext.ops import residual_quantize
from genrec_ext.tokenizers import RQVAE, kinds, load

SMALL = {"levels": 2, "codebook_size": 8, "hidden": (16,), "latent": 4, "epochs": 30}


def clusters(rows: int = 200, columns: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(12, columns, generator=g)
    return centers[torch.randint(12, (rows,), generator=g)] + torch.randn(
        rows, columns, generator=g
    )


def fitted(**changes) -> RQVAE:
    return RQVAE(**{**SMALL, **changes}).fit(clusters())


def test_codes_are_the_nearest_codewords_of_the_latents() -> None:
    tokenizer, x = fitted(), clusters()
    codes = tokenizer.encode(x)
    want = residual_quantize(tokenizer.latents(x), tokenizer.codebooks)[0]
    assert torch.equal(codes, want) and codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.fitted_codes)


def test_loss_equals_its_definition_and_stops_gradients_where_it_says() -> None:
    tokenizer = fitted().double()
    x = tokenizer.normalized(clusters().double())
    codes = tokenizer.assign(x)
    loss, parts = tokenizer.token_loss(x, codes)

    z = tokenizer.encoder(x)
    v, total, chosen = z, 0.0, torch.zeros_like(z)
    for level in range(2):
        e = tokenizer.books[level][codes[:, level]]
        total = total + ((v.detach() - e) ** 2).sum(1).mean()
        total = total + 0.25 * ((v - e.detach()) ** 2).sum(1).mean()
        chosen, v = chosen + e, v - e.detach()
    rebuilt = tokenizer.decoder(z + (chosen - z).detach())
    want = total + ((x - rebuilt) ** 2).sum(1).mean()
    assert want.item() > 0.1
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    parameters = list(tokenizer.parameters())
    for got, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(parts["quantization"], ((z - chosen) ** 2).sum(1).mean().detach())


def test_fitting_learns_to_rebuild() -> None:
    x = clusters()
    before = RQVAE(**{**SMALL, "epochs": 1}).fit(x).report()["explained"]
    tokenizer = fitted(epochs=200, rate=1e-2)
    after = tokenizer.report()["explained"]
    assert after > 0.7 and after > before
    error = (x - tokenizer.decode(tokenizer.encode(x))).square().sum(1).mean()
    variance = (x - x.mean(0)).square().sum(1).mean()
    assert abs(1 - float(error / variance) - after) < 1e-4


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    state = torch.get_rng_state()
    first, second, other = fitted(), fitted(), fitted(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert not torch.equal(first.codebooks, other.codebooks)


def test_scale_and_place_of_the_vectors_do_not_matter() -> None:
    codes = fitted().fitted_codes
    moved = RQVAE(**SMALL).fit(1024 * clusters())  # a power of two: the same bits
    assert torch.equal(moved.fitted_codes, codes)


@pytest.mark.parametrize("changes", ({}, {"codebook": "ema"}, {"epsilon": 0.05}))
def test_saved_and_loaded_is_the_same(tmp_path, changes) -> None:
    tokenizer = fitted(**changes)
    tokenizer.save(tmp_path / "t.safetensors")
    state = torch.get_rng_state()
    again = load(tmp_path / "t.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(again, RQVAE) and again.settings() == tokenizer.settings()
    x = clusters(seed=3)
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again.decode(again.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert kinds()["rqvae"] is RQVAE


def test_a_file_whose_tensors_do_not_fit_is_refused(tmp_path) -> None:
    tokenizer = fitted()
    tokenizer.settings = lambda: {**RQVAE.settings(tokenizer), "latent": 5}  # type: ignore[method-assign]
    tokenizer.save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        load(tmp_path / "t.safetensors")


def test_moving_averages_are_means_of_what_is_assigned() -> None:
    # One step on all vectors, without history: each codeword becomes the mean of its residuals.
    x = clusters()
    tokenizer = RQVAE(**{**SMALL, "codebook": "ema", "epochs": 1, "decay": 0.0, "restart": False})
    moved = []
    original = RQVAE._move_averages

    def watched(self, x, codes):
        residual = self.encode_latents(x).detach()
        before = self.books.detach().clone()
        original(self, x, codes)
        for level in range(2):
            for code in codes[:, level].unique():
                mine = codes[:, level] == code
                got = self.books[level, code]
                torch.testing.assert_close(got, residual[mine].mean(0), rtol=1e-4, atol=1e-5)
                moved.append(code)
            residual = residual - before[level][codes[:, level]]

    tokenizer._move_averages = watched.__get__(tokenizer)  # type: ignore[method-assign]
    tokenizer.fit(x)
    assert moved and not tokenizer.books.requires_grad


def test_unused_codewords_start_anew_where_items_are() -> None:
    x = clusters()
    tokenizer = fitted()
    with torch.no_grad():
        tokenizer.books[0, 3] = 1e4  # nothing is ever nearest to it
    optimizer = torch.optim.AdamW(tokenizer.parameters(), fused=True)
    tokenizer.token_loss(tokenizer.normalized(x), tokenizer.encode(x))[0].backward()
    optimizer.step()
    dead = torch.zeros(2, 8, dtype=torch.bool)
    dead[0, 3] = True
    kept = tokenizer.books.detach().clone()
    tokenizer._restart(tokenizer.normalized(x), dead, optimizer, torch.Generator().manual_seed(0))
    distance = torch.cdist(tokenizer.books[:1, 3], tokenizer.latents(x)).min()
    assert distance < 1e-5
    assert torch.equal(tokenizer.books[~dead], kept[~dead])
    assert (optimizer.state[tokenizer.books]["exp_avg"][0, 3] == 0).all()
    assert (optimizer.state[tokenizer.books]["exp_avg"][0, 2] != 0).any()


def test_sinkhorn_uses_the_codewords_evenly() -> None:
    x = torch.cat([clusters(20), clusters(180)[:1] + 0.01 * clusters(180)])
    plain, balanced = fitted(epochs=1), fitted(epochs=1, epsilon=0.05)
    for tokenizer in (plain, balanced):
        tokenizer.fit(x)
    loads = [
        torch.bincount(t.assign(t.normalized(x))[:, 0], minlength=8).max()
        for t in (plain, balanced)
    ]
    assert loads[1] < 0.5 * loads[0]


def test_odd_inputs() -> None:
    for x in (
        torch.ones(9, 3),  # constant
        torch.zeros(5, 3),
        torch.randn(3, 2).repeat(4, 1),  # duplicates; fewer than codes
        torch.randn(1, 4),
        torch.randn(12, 1),
    ):
        tokenizer = RQVAE(**{**SMALL, "epochs": 3}).fit(x)
        codes = tokenizer.encode(x)
        assert codes.shape == (len(x), 2) and 0 <= codes.min() <= codes.max() < 8
        assert tokenizer.decode(codes).isfinite().all()
        for row in range(len(x)):  # equal vectors have equal codes
            same = (x == x[row]).all(1)
            assert (codes[same] == codes[row]).all()
    only = RQVAE(levels=1, codebook_size=1, hidden=(), latent=1, epochs=2).fit(clusters())
    assert (only.encode(clusters()) == 0).all()
    assert only.encode(torch.empty(0, 6)).shape == (0, 1)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert RQVAE(**{**SMALL, "epochs": 1}).fit(clusters().to(dtype)).levels == 2


@pytest.mark.parametrize(
    "bad, text",
    (
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity in row 0"),
        (torch.zeros(0, 3), "no rows"),
        (torch.zeros(3), r"expected floats \[N, D\]"),
        (torch.zeros(3, 2, dtype=torch.int64), "expected floats"),
    ),
)
def test_what_cannot_be_fitted_is_an_error(bad, text) -> None:
    with pytest.raises(ValueError, match=text):
        RQVAE(**SMALL).fit(bad)


@pytest.mark.parametrize(
    "changes, text",
    (
        ({"levels": 0}, "levels: 0; expected 1 or more"),
        ({"hidden": (4, 0)}, "hidden: 0; expected 1 or more"),
        ({"rate": 0.0}, "rate: 0.0; expected more than 0"),
        ({"decay": 1.0}, "decay: 1.0; expected 0 <= decay < 1"),
        ({"epsilon": -1.0}, "epsilon: -1.0; expected 0 or more"),
        ({"codebook": "x"}, "codebook: 'x'; expected"),
    ),
)
def test_settings_out_of_range(changes, text) -> None:
    with pytest.raises(ValueError, match=text):
        RQVAE(**{**SMALL, **changes})


def test_before_fitting_and_of_other_widths() -> None:
    tokenizer = RQVAE(**SMALL)
    for call in (lambda: tokenizer.codebooks, lambda: tokenizer.encode(clusters())):
        with pytest.raises(RuntimeError, match="call fit"):
            call()
    with pytest.raises(ValueError, match="3 dimensions; expected 6, as fitted"):
        fitted().encode(torch.zeros(2, 3))


def test_large_vectors_have_a_scale() -> None:
    x = clusters()
    tokenizer, large = fitted(), RQVAE(**SMALL).fit(x * 1e17)
    assert large.scale.isfinite() and large.decode(large.encode(x * 1e17)).isfinite().all()
    assert abs(large.report()["explained"] - tokenizer.report()["explained"]) < 0.05


@pytest.mark.parametrize("rows", (10, 50, 1000))
@pytest.mark.parametrize("value", (0.1, 0.3, 7.7))
def test_equal_vectors_have_one_code(rows: int, value: float) -> None:
    x = torch.full((rows, 6), value)
    tokenizer = RQVAE(**{**SMALL, "epochs": 2}).fit(x)
    codes = tokenizer.encode(x)
    assert len(codes.unique(dim=0)) == 1 and float(tokenizer.scale) == 1
    assert torch.equal(tokenizer.encode(x[:1]), codes[:1])


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_it_learns_where_gradients_are_turned_off(mode) -> None:
    with mode():
        tokenizer = fitted()
    assert torch.equal(tokenizer.codebooks, fitted().codebooks)


def test_gradient_of_the_decoder_passes_the_quantization_by() -> None:
    tokenizer = fitted()
    x = tokenizer.normalized(clusters())
    z = tokenizer.encode_latents(x)
    loss, _ = tokenizer.token_loss(x, tokenizer.assign(x), z)
    (grad,) = torch.autograd.grad(loss, z)
    tokenizer.commitment = 0.0
    loss, _ = tokenizer.token_loss(x, tokenizer.assign(x), z)
    (alone,) = torch.autograd.grad(loss, z)
    assert alone.abs().sum() > 0 and F.cosine_similarity(grad, alone, dim=1).mean() < 1


def test_the_gradient_of_the_loss_adds_in_a_fixed_order() -> None:
    vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    tokenizer = RQVAE(3, 4, hidden=(16,), latent=4, epochs=1).fit(vectors)
    x, codes = tokenizer.normalized(vectors), tokenizer.fitted_codes
    loss, _ = tokenizer.token_loss(x, codes)
    assert not repeated_indices(loss + tokenizer.quantized(codes).sum())


@pytest.mark.parametrize("settings", [{"rate": 1e30}, {"rate": 1e6, "epochs": 40}])
def test_a_fit_that_diverges_says_so(settings: dict) -> None:
    tokenizer = RQVAE(2, 8, hidden=(16,), latent=4, **settings)
    vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        FloatingPointError, match=r"loss is (nan|inf) in epoch \d+; .*rate below 1e"
    ):
        tokenizer.fit(vectors)
    with pytest.raises(RuntimeError, match="call fit"):
        tokenizer.encode(vectors)


@pytest.mark.parametrize("name", ["rate", "commitment", "epsilon"])
def test_settings_are_finite(name: str) -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name}: {value}; expected"):
            RQVAE(**{name: value})
