"""Closed-loop evaluation in simulators; without `local` nothing here imports JAX: simulators live apart.

statistics   how sure a success rate is
rendering    small pictures of a MuJoCo scene in a few milliseconds on a CPU
libero       LIBERO's tasks as openpi's client shows them
metaworld    MetaWorld's tasks with a picture, a state of four numbers and an instruction; their scripted experts
rollouts     one episode, and what it needs of a simulator and of a policy
parallel     episodes in processes; who waits for actions is answered together
remote       a policy behind a server
local        a policy in this process, which does import JAX
pictures     a page of filmed episodes
summary      what was found, for JSON
"""
