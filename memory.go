// What a service holds in memory of what clients made it keep. What counts towards it is in eventlog.go, tasks.go and
// version.go.

package main

import (
	"math/bits"
	"net/http"
)

// budget is how many bytes the parts of a service may hold together, and how many they do. The service's mutex guards
// it.
type budget struct {
	limit int
	held  int
}

// count notes that a part, of which *held was counted until now, holds n bytes.
func (b *budget) count(held *int, n int) {
	b.held += n - *held
	*held = n
}

// fits reports whether there is room for n bytes more.
func (b *budget) fits(n int) bool { return b.held+n <= b.limit }

// heapSize is about how many bytes of the heap a string of n bytes takes. The runtime rounds up: to one of about eight
// sizes between two powers of two, and beyond 32 KiB to pages of 8 KiB.
func heapSize(n int) int {
	step := max(8, 1<<bits.Len(uint(n))>>4)
	if n > 32<<10 {
		step = 8 << 10
	}
	return (n + step - 1) &^ (step - 1)
}

// errNoRoom says that a service remembers as much as it may.
var errNoRoom = newError(http.StatusServiceUnavailable, "no_room", "too many announcements or request IDs")
