//go:build race

package main

// underRace is whether the race detector slows the tests down.
const underRace = true
