// The ordered, numbered events of one task or one request_id, and how far each follower of them is. Connections and
// tokens are not known here; follower.go delivers the events.

package main

import (
	"context"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
)

// logPolicy is what the event logs of one service have in common.
type logPolicy struct {
	event string        // name of the events
	epoch func() string // makes the epoch of a log; nil for events without ID

	// replay makes every fresh connection start at the first event. Without it, one starts at the first event that is
	// not known to be with a browser.
	replay bool
	// limit is how many events are kept that a fresh connection would get, and how many others: a browser that lost its
	// connection may ask for them by ID. 0 means no limit. Beyond it the oldest that is not marked goes; dropped
	// counts those that nobody was given.
	limit   int
	dropped *series
}

// eventLog is the events of one task or one request_id, numbered from 1 without a gap.
//
// Lock order: a service's, a follower's, then mu.
type eventLog struct {
	policy *logPolicy
	epoch  string // first part of the IDs, another for each log; "" for events without ID

	mu      sync.Mutex // guards the rest, and the cursors
	entries []entry    // ascending numbers
	bytes   int        // that their data takes, as far as it is not shared
	last    uint64     // number of the newest event
	visible uint64     // the last number that may be shown
	start   uint64     // a fresh connection gets what is after it
	given   uint64     // the last number that an open stream was given
	reason  string     // of the end; once set, nothing more is appended
	left    bool       // to those that follow it now
	cursors []*cursor
	changed chan struct{} // closed when what Wait looks at changes; nil while nobody waits
}

// maxEventData is how many bytes the data of an event has at most, as clients exist that break at a line of 65,536.
const maxEventData = 64_000

type entry struct {
	n      uint64
	data   string
	keep   bool // never dropped by the limit
	shared bool // its data is in other logs, too
}

// entrySize is how many bytes an entry takes without its data.
const entrySize = 32

// size is how many bytes of data only this log holds.
func (e entry) size() int {
	if e.shared {
		return 0
	}
	return heapSize(len(e.data))
}

// reader is who follows a log. Both methods are called with the log locked.
type reader interface {
	wake()         // there is something new
	working() bool // it is about to deliver, or does
}

// cursor is how far one reader is in one log.
type cursor struct {
	log      *eventLog
	reader   reader
	sent     uint64 // the last number that the gateway took
	first    uint64 // of the run that is in flight
	inFlight uint64 // the last number of that run; 0 for none
	detached bool   // the reader follows no more
}

func newEventLog(policy *logPolicy) *eventLog {
	l := &eventLog{policy: policy}
	if policy.epoch != nil {
		l.epoch = policy.epoch()
	}
	return l
}

// id is the event ID of number n.
func (l *eventLog) id(n uint64) string {
	if l.epoch == "" {
		return ""
	}
	var b strings.Builder
	l.writeID(&b, n)
	return b.String()
}

// maxPosition is more than the bytes of an event ID of a single log.
const maxPosition = 32

func (l *eventLog) writeID(b *strings.Builder, n uint64) {
	var digits [20]byte
	b.WriteString(l.epoch)
	b.WriteByte('-')
	b.Write(strconv.AppendUint(digits[:0], n, 10))
}

// parsePositions returns the number for each epoch that an event ID names, or nothing if it is no ID of ours.
func parsePositions(id string) map[string]uint64 {
	positions := map[string]uint64{}
	for part := range strings.SplitSeq(id, ".") {
		epoch, number, _ := strings.Cut(part, "-")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil || epoch == "" {
			return nil
		}
		positions[epoch] = n
	}
	return positions
}

// Append adds an event that everybody may see, and returns its number, or 0 after End. It does not wait for its
// delivery.
func (l *eventLog) Append(data string, keep bool) (n uint64) {
	n = l.Add(entry{data: data, keep: keep})
	l.Publish(n)
	return n
}

// Add is Append for an event that nobody sees before Publish.
func (l *eventLog) Add(e entry) (n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reason != "" {
		return 0
	}
	e.n = l.last + 1
	l.addLocked(e)
	return e.n
}

// Restore adds an event of an earlier process under its number. Everybody may see it, and it does not count as dropped:
// whether somebody was given it is not known.
func (l *eventLog) Restore(e entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.visible, l.given = e.n, e.n
	l.addLocked(e)
}

func (l *eventLog) addLocked(e entry) {
	l.last = e.n
	l.entries = append(l.entries, e)
	l.bytes += e.size()
	l.trimLocked()
}

// Publish lets the followers have the events up to n.
func (l *eventLog) Publish(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.visible = max(l.visible, n)
	l.wakeLocked()
}

// End makes connection_close with this reason follow the last event, on every connection that follows this log alone.
func (l *eventLog) End(reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reason = reason
	l.wakeLocked()
}

func (l *eventLog) wakeLocked() {
	for _, c := range l.cursors {
		c.reader.wake()
	}
}

// Wait waits until event n is known to be with an open stream. It returns false when ctx ends, when the event was
// dropped, or when no follower is at work: there is none, or it failed.
func (l *eventLog) Wait(ctx context.Context, n uint64) bool {
	for {
		l.mu.Lock()
		done := l.given >= n
		going := l.hasLocked(n) || l.inFlightLocked(n)
		going = going && slices.ContainsFunc(l.cursors, func(c *cursor) bool { return c.reader.working() })
		if done || !going {
			l.mu.Unlock()
			return done
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

// notify has Wait look again.
func (l *eventLog) notify() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notifyLocked()
}

func (l *eventLog) notifyLocked() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// logStats is what a log holds at one moment.
type logStats struct {
	kept      int    // events
	waiting   int    // those of them that a fresh connection would get
	bytes     int    // of data that is not shared
	held      int    // of the heap, without shared data
	start     uint64 // the number after which a fresh connection begins
	last      uint64 // the number of the newest event
	followers int
}

func (l *eventLog) stats() logStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return logStats{
		kept:      len(l.entries),
		waiting:   len(l.entries) - l.indexLocked(l.start),
		bytes:     l.bytes,
		held:      l.bytes + cap(l.entries)*entrySize,
		start:     l.start,
		last:      l.last,
		followers: len(l.cursors),
	}
}

// After returns the events that follow the one with this ID, most at most: from the first that is kept, if it is none
// of this log.
func (l *eventLog) After(id string, most int) (events []event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := parsePositions(id)[l.epoch]
	if n > l.last {
		n = 0
	}
	rest := l.shownLocked(n)
	for _, e := range rest[:min(most, len(rest))] {
		events = append(events, event{ID: l.id(e.n), Name: l.policy.event, Data: e.data})
	}
	return events
}

// DropOldest drops the oldest event that is not marked and not the last one. It reports whether there was one.
func (l *eventLog) DropOldest() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.entries) > 0 && l.loseLocked(0, len(l.entries)-1)
}

// All returns the events that are kept.
func (l *eventLog) All() []entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.entries)
}

// Received notes that a browser has the events up to n.
func (l *eventLog) Received(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.receivedLocked(n)
}

// Shed drops the events that neither a fresh connection nor a follower would get.
func (l *eventLog) Shed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shedLocked(l.start)
}

// Leave leaves the log to those that follow it now: what all of them have is dropped, now and later.
func (l *eventLog) Leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left = true
	l.leaveLocked()
}

func (l *eventLog) leaveLocked() {
	if l.left && len(l.entries) > 0 && len(l.cursors) > 0 { // without them it is garbage soon
		l.shedLocked(l.last)
	}
}

func (l *eventLog) shedLocked(needed uint64) {
	for _, c := range l.cursors {
		needed = min(needed, c.sent)
	}
	l.dropLocked(0, l.indexLocked(needed))
	l.entries = slices.Clone(l.entries)
}

// indexLocked returns the index of the first event after n.
func (l *eventLog) indexLocked(n uint64) int {
	return sort.Search(len(l.entries), func(i int) bool { return l.entries[i].n > n })
}

// shownLocked returns the events after n that may be shown.
func (l *eventLog) shownLocked(n uint64) []entry {
	from := l.indexLocked(n)
	return l.entries[from:max(from, l.indexLocked(l.visible))]
}

func (l *eventLog) hasLocked(n uint64) bool {
	i := l.indexLocked(n - 1)
	return i < len(l.entries) && l.entries[i].n == n
}

// inFlightLocked reports whether event n is under way to anybody.
func (l *eventLog) inFlightLocked(n uint64) bool {
	return slices.ContainsFunc(l.cursors, func(c *cursor) bool { return c.first <= n && n <= c.inFlight })
}

// trimLocked drops what the policy does not keep.
func (l *eventLog) trimLocked() {
	limit := l.policy.limit
	if limit == 0 {
		return
	}
	from := l.indexLocked(l.start)
	if from > limit {
		l.dropLocked(0, from-limit)
		from = limit
	}
	for len(l.entries)-from > limit && l.loseLocked(from, len(l.entries)) {
	}
}

// loseLocked drops the oldest event between two indexes that is not marked, and reports whether there was one. It
// counts unless somebody was given it, or may be: see settle.
func (l *eventLog) loseLocked(from, to int) bool {
	i := slices.IndexFunc(l.entries[from:to], func(e entry) bool { return !e.keep })
	if i < 0 {
		return false
	}
	i += from
	if n := l.entries[i].n; n > l.given && !l.inFlightLocked(n) {
		l.policy.dropped.Inc()
	}
	l.dropLocked(i, i+1)
	l.notifyLocked()
	return true
}

func (l *eventLog) dropLocked(from, to int) {
	for _, e := range l.entries[from:to] {
		l.bytes -= e.size()
	}
	l.entries = slices.Delete(l.entries, from, to)
}

// attach lets a reader follow the log: after the event that it names if that is one of this log, and from the start
// otherwise.
func (l *eventLog) attach(r reader, named map[string]uint64) *cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &cursor{log: l, reader: r, sent: l.start}
	if n, ok := named[l.epoch]; ok && n <= l.last {
		c.sent = n
		l.receivedLocked(n)
	}
	l.cursors = append(l.cursors, c)
	l.notifyLocked()
	return c
}

// received notes that a browser has what was sent.
func (c *cursor) received() {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	if !c.detached {
		c.log.receivedLocked(c.sent)
	}
}

// detach ends the following. What was sent and not received is given again to the next reader that names no ID.
func (c *cursor) detach() {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	c.detached = true
	c.log.cursors = slices.DeleteFunc(c.log.cursors, func(other *cursor) bool { return other == c })
	c.log.leaveLocked()
	c.log.notifyLocked()
}

// A run is what goes to the gateway at once: more with each success, up to this many events or bytes. Their JSON is far
// from its limits, so that it refuses none from the middle of a run.
const (
	maxRun      = 64
	maxRunBytes = 64 << 10
)

// take returns the next events for the reader, most at most. They are in flight until settle. If there are none it
// returns the reason of the end, if the log has ended.
func (c *cursor) take(most int) (run []entry, reason string) {
	l := c.log
	l.mu.Lock()
	defer l.mu.Unlock()
	run = l.shownLocked(c.sent)
	switch {
	case c.detached, len(run) == 0 && l.visible < l.last:
		return nil, ""
	case len(run) == 0:
		return nil, l.reason
	}
	size := 0
	for i, e := range run {
		size += len(e.data)
		if i == most || i > 0 && size > maxRunBytes {
			run = run[:i]
			break
		}
	}
	c.first, c.inFlight = run[0].n, run[len(run)-1].n
	return slices.Clone(run), ""
}

// behind reports whether anything comes after event n, be it the end if that counts.
func (c *cursor) behind(n uint64, end bool) bool {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	return end && c.log.reason != "" || len(c.log.shownLocked(n)) > 0
}

// settle notes that the gateway took the first events of a run, and whether all that was sent is with an open stream.
func (c *cursor) settle(run []entry, taken int, given bool) {
	l := c.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.detached { // what a connection that is no more was given moves nothing
		c.inFlight = 0
		if taken > 0 {
			c.sent = run[taken-1].n
		}
		if given {
			l.given = max(l.given, c.sent)
		}
	}
	for _, e := range run[taken:] {
		if e.n > l.given && !l.hasLocked(e.n) && !l.inFlightLocked(e.n) {
			l.policy.dropped.Inc() // while it was under way
		}
	}
	l.leaveLocked()
	l.notifyLocked()
}

// receivedLocked notes that a browser has the events up to n. Without replay they need not be given to a fresh
// connection any more.
func (l *eventLog) receivedLocked(n uint64) {
	l.given = max(l.given, n)
	if !l.policy.replay && n > l.start {
		l.start = n
		l.trimLocked()
	}
}
