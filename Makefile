# pinpod: build, test, demonstrate, measure. Everything a target needs is provisioned by it.
.PHONY: build
build:
	cargo build --release --locked
