# SPDX-License-Identifier: Apache-2.0
"""Training a draft offline from the target's own outputs: collect once, then train."""
