"""The critic of the step-level method: trains V_φ on Monte-Carlo values of states, tests it, gives its values.

Direct Advantage Policy Optimization (arXiv:2412.18279), Section 3.2.
"""
