# SPDX-License-Identifier: Apache-2.0
"""Target families, and how their weights arrive."""
