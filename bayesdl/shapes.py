r"""Shape words: the letters by which docstrings and annotations name the axes of a tensor. There is no code here.

A docstring says `x (*b n d)` for a tensor whose last two axes are n inputs of d features, with any batch axes in front.

    *b   leading batch axes, any number of them, none included; they broadcast against each other
    n    training points                     s    test points
    m    inducing points, or the points of a second input z
    d    input features                      k    outputs, or classes
    C    chains of a sampler, or members of an ensemble
    D    all unconstrained coordinates of a model laid end to end
    *g   groups of chains that adapt separately: one data set each, fitted at the same time
    M    components of a mixture, draws of a posterior, or random features

What carries them:

    x        (*b n d)    inputs              y       (*b n) or (*b n k)   targets
    xs       (*b s d)    test inputs         z       (*b m d)             second or inducing inputs
    k_xx     (*b n n)    covariance at x     k_xs    (*b n s)             cross-covariance
    k_ss     (*b s s)    covariance at xs    chol    (*b n n)             lower Cholesky factor
    params   a mapping from name to tensor: (*b) for a scalar, (*b d) for one value per feature
    q        (*g C D)    positions of chains in unconstrained space

Wherever a batch is accepted, the result equals a loop over its elements.
"""
