// Names of what is compiled once per instruction set.
#pragma once
#define TDPASS_JOIN_(name, isa) name##_##isa
#define TDPASS_JOIN(name, isa) TDPASS_JOIN_(name, isa)
// TDPASS_TARGET is set by the build: one of its TARGETS.
#define TDPASS_SYMBOL(name) TDPASS_JOIN(name, TDPASS_TARGET)
// Inline code of one instruction set must not be merged with that of another.
#define tdpass TDPASS_JOIN(tdpass, TDPASS_TARGET)
