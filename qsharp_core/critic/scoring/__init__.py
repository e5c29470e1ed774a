"""Scoring: what a critic says of the candidates of a step. One protocol, three implementations.

base                the protocol (`CandidateScorer`), and the question that a step asks (`Question`)
build               chooses between the two scorers with a cache; nobody else does
paged               any backbone: what a row lacks and its candidates, packed, with a paged cache
fixed               accelerators: steps of fixed shapes, which can be captured as CUDA graphs
native              a head on the reference's hidden states: no backbone, no cache

What the two scorers with a cache share:

cached              life of a request's cached sequence, audits, plain forward passes
backbone            the backbone and its cache: forward passes over packed tokens, prefill
cache               bookkeeping on the host: blocks, shared prefixes, sequences
kv_pool             the tensors of keys and values
layout              where packed tokens and their keys lie, and which keys a token sees
attention           the attention functions that the backbone runs
check               a cached pass is compared with a plain one before a critic serves

Parts of one of them:

choices             paged: candidates' keys and values, kept for the step that follows
cpu                 paged, on CPUs: attention with its log-sum-exp, linear layers with packed weights
decoder             fixed: the step itself, compiled and captured
prefix_attention    fixed: attention to a row's blocks, and its merge with a candidate's attention to itself
"""
