"""The bench host: a nested machine whose kernel has KVM, vhost and VFIO, for tests that need them."""
