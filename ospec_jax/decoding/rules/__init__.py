# SPDX-License-Identifier: Apache-2.0
"""Rules by which drawn trees are accepted, one file each.

A rule is a function of one row: `(uniforms [n], tree, rank, target_probs [n, v]) ->
(last, rest)`, the last accepted node and the weights `[v]` that the target's own token
after it is drawn by. Each node is accepted by its own uniform number; `rank[n]` is how
many earlier siblings it has.
"""
