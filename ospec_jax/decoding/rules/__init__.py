# SPDX-License-Identifier: Apache-2.0
"""Rules by which drawn trees are accepted, one file each.

A rule is a function of one row: `(key, tree, rank, target_probs [n, v]) -> (last,
next_token)`, the last accepted node and the target's own token after it. `rank[n]` is
how many earlier siblings a node has.
"""
