// Bounds for what a service keeps in memory for its clients. What counts towards them is in eventlog.go, tasks.go and
// version.go.

package main

import (
	"math/bits"
	"net/http"
	"sync/atomic"
)

// budget bounds the bytes that the parts of a service hold together. The service's mutex guards it; the totals may be
// read without.
type budget struct {
	limit  int
	bytes  atomic.Int64
	events atomic.Int64
}

// share is what a part of a service holds of it.
type share struct{ bytes, events int }

// count notes what a part holds now. *before is what was counted for it before, and becomes the same.
func (b *budget) count(before *share, now share) {
	b.bytes.Add(int64(now.bytes - before.bytes))
	b.events.Add(int64(now.events - before.events))
	*before = now
}

// fits reports whether there is room for n bytes more.
func (b *budget) fits(n int) bool { return int(b.bytes.Load())+n <= b.limit }

// heapSize returns about how many bytes of the heap a string of n bytes takes. The runtime rounds up: to one of about
// eight sizes between two powers of two, and beyond 32 KiB to pages of 8 KiB.
func heapSize(n int) int {
	step := max(8, 1<<bits.Len(uint(n))>>4)
	if n > 32<<10 {
		step = 8 << 10
	}
	return (n + step - 1) &^ (step - 1)
}

// errNoRoom says that a service holds as much as it may.
var errNoRoom = newError(http.StatusServiceUnavailable, "no_room", "too many announcements or request IDs")
