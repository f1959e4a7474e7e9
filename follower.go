// Delivery: a follower gives one connection the events of one or more logs, each once and in the order of its log.
// Tasks and versions are not known here. The events are in eventlog.go, the connection is in connmgr.go.

package main

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// settleTime is how long a connection must have been open for what it was given to count as received. A browser that
// leaves sooner may not have read a byte.
const settleTime = time.Second

// follower delivers events to one connection, that is, to one token. One goroutine at a time does so, one run of events
// after the other, and nothing is tried twice. When the connection is replaced its follower is told, and from then on
// moves no position: a send that is still under way reaches neither the new connection nor what that is given.
//
// The ID of an event is the position in every log, so that a browser that comes back goes on in each. Only a follower
// of a single log ends with it.
type follower struct {
	identifier string
	token      string
	conns      *ConnectionManager
	onEnd      func() // called when the connection is no more, perhaps twice; may be nil
	state      atomic.Int32

	// For deliver alone.
	turn   uint32 // the cursor that comes first in the next run
	closed bool   // the connection was given the end
	asked  bool   // the gateway was asked about buffered in vain

	page   bool // follows any number of logs
	probes bool // the gateway can be asked about the stream before it is open

	mu       sync.Mutex // guards the rest
	cursors  []*cursor  // only added to
	since    time.Time  // when the connection was opened, as far as is known
	buffered bool       // the last events wait at the gateway, which may still drop them
	stopped  bool       // the connection has ended
}

// States of a follower: whether deliver runs, and is to look once more. Before begin it does not: IDs would lack the
// positions in the logs that are not there yet.
const (
	notBegun int32 = iota
	idle
	working
	workingAgain
)

// follow makes the stream of c the connection of identifier, in place of any other, and returns the event that begins
// it. Delivery goes on after its last event ID if that is an event of log, and from the start of log otherwise. A
// stream that was asked for before the present connection is the one that is replaced: the event that it begins with
// ends it. The error is errAskFirst.
func follow(conns *ConnectionManager, identifier string, c connectRequest, log *eventLog) (open event, end bool, err error) {
	f := &follower{identifier: identifier}
	return f.connect(conns, c, func() []*eventLog { return []*eventLog{log} })
}

// connect is follow for a follower of the logs that it asks for once it is the connection.
func (f *follower) connect(conns *ConnectionManager, c connectRequest, logs func() []*eventLog) (open event, end bool, err error) {
	f.conns, f.token, f.probes, f.since = conns, c.token, c.probes, time.Now()
	replaced, err := conns.OnConnect(f.identifier, c, f)
	if err == errOutdated {
		return closeEvent("replaced"), true, nil
	}
	if err != nil {
		return event{}, false, err
	}
	position, stopped := f.begin(logs(), c.lastEventID)
	if stopped && f.onEnd != nil {
		f.onEnd() // again, as there are logs only now
	}
	if replaced != "" {
		conns.CloseReplaced(f.identifier, replaced)
	}
	return event{ID: position, Name: "connection_open", Data: `{"status":"connected"}`}, false, nil
}

// begin starts the delivery, unless the connection has ended meanwhile, and returns the ID of the event after which it
// goes on.
func (f *follower) begin(logs []*eventLog, lastEventID string) (position string, stopped bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	named := parsePositions(lastEventID)
	for _, log := range logs {
		f.cursors = append(f.cursors, log.attach(f, named))
	}
	_, position = around(f.cursors, nil)
	if f.stopped {
		f.detachLocked()
	} else {
		f.state.Store(idle)
		f.wake()
	}
	return strings.TrimPrefix(position, "."), f.stopped
}

// add has the follower follow one more log, from its first event on.
func (f *follower) add(log *eventLog) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return
	}
	f.cursors = append(f.cursors, log.attach(f, nil))
	f.wake()
}

// around returns what the ID of an event has before and after the part of c: the positions in the other logs.
func around(cursors []*cursor, c *cursor) (before, after string) {
	var ids strings.Builder
	middle := 0
	for _, other := range cursors {
		switch {
		case other == c:
			middle = ids.Len()
		case other.log.epoch != "":
			ids.WriteByte('.')
			other.log.writeID(&ids, other.sent)
		}
	}
	before, after = ids.String()[:middle], ids.String()[middle:]
	if before != "" {
		before = before[1:] + "."
	}
	return before, after
}

// seen notes that the connection is there at that time, and is open.
func (f *follower) seen(at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seenLocked(at)
}

func (f *follower) seenLocked(at time.Time) {
	if f.buffered || at.Sub(f.since) < settleTime {
		return
	}
	for _, c := range f.cursors {
		c.received()
	}
}

// ended stops the delivery: the connection is no more. It was there until the given time; if that is not known, it is
// zero.
func (f *follower) ended(until time.Time) {
	f.mu.Lock()
	stopped := f.stopped
	f.stopped = true
	f.seenLocked(until)
	f.detachLocked()
	f.mu.Unlock()
	if !stopped && f.onEnd != nil {
		f.onEnd()
	}
}

func (f *follower) detachLocked() {
	for _, c := range f.cursors {
		c.detach()
	}
}

// wake has deliver look for what is new. It takes no lock, so that a log may call it.
func (f *follower) wake() {
	for {
		switch state := f.state.Load(); {
		case state == notBegun, state == workingAgain, f.state.CompareAndSwap(working, workingAgain):
			return
		case f.state.CompareAndSwap(idle, working):
			f.conns.spawn(f.deliver)
			return
		}
	}
}

func (f *follower) working() bool { return f.state.Load() != idle }

// rest ends deliver, unless it was woken meanwhile.
func (f *follower) rest(cursors []*cursor) bool {
	if !f.state.CompareAndSwap(working, idle) {
		f.state.Store(working)
		return false
	}
	for _, c := range cursors {
		c.log.notify()
	}
	return true
}

// deliver sends until the connection has everything or is no more, or until there is nothing left to try.
func (f *follower) deliver() {
	most := 1
	for {
		f.mu.Lock()
		cursors := f.cursors
		f.mu.Unlock()
		c, run, reason := f.next(cursors, most)
		var events []event
		end := false
		switch {
		case len(run) > 0:
			events = f.events(cursors, c, run)
		case reason != "" && !f.closed:
			events, end = []event{closeEvent(reason)}, true
		default:
			if !f.awaitOpen() && f.rest(cursors) {
				return
			}
			continue
		}
		began := time.Now()
		r := f.conns.Send(f.identifier, f.token, events, end)
		most = max(1, min(2*r.taken, maxRun))
		f.closed = end && r.err == nil
		if !f.settle(c, run, r, began) && f.rest(cursors) {
			return
		}
	}
}

// next returns the next run, or the reason of the end if there is none. The cursors take turns, but what has no ID goes
// first: that a task is not known must not come after its events.
func (f *follower) next(cursors []*cursor, most int) (c *cursor, run []entry, reason string) {
	if !f.page {
		run, reason = cursors[0].take(most)
		return cursors[0], run, reason
	}
	for _, c = range cursors {
		if c.log.epoch != "" {
			continue
		}
		if run, _ = c.take(most); len(run) > 0 {
			return c, run, ""
		}
	}
	for range cursors {
		c = cursors[int(f.turn)%len(cursors)]
		f.turn++
		if run, _ = c.take(most); len(run) > 0 {
			break
		}
	}
	return c, run, ""
}

func (f *follower) events(cursors []*cursor, c *cursor, run []entry) []event {
	before, after := around(cursors, c)
	var ids strings.Builder // of the whole run, as those of a page are long
	ids.Grow(len(run) * (len(before) + maxPosition + len(after)))
	events := make([]event, len(run))
	for i, e := range run {
		events[i] = event{Name: c.log.policy.event, Data: e.data}
		if c.log.epoch != "" {
			start := ids.Len()
			ids.WriteString(before)
			c.log.writeID(&ids, e.n)
			ids.WriteString(after)
			events[i].ID = ids.String()[start:]
		}
	}
	return events
}

// settle notes what became of a run, whose send began at that time, or of the end, which is a run without events. It
// reports whether to go on. After a failure that is so if there is more to send: trying to ends the stream, so that the
// browser comes back for what it may lack.
func (f *follower) settle(c *cursor, run []entry, r sendResult, began time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	took := r.taken > r.refused // what the gateway refuses arrives nowhere, and tells nothing of the stream
	opened := false
	if r.err == nil && took {
		opened = f.buffered && !r.buffered
		f.buffered, f.asked = r.buffered, false
	}
	c.settle(run, min(r.taken, len(run)), took && !f.buffered)
	if opened { // not before: it would settle the run without its events
		f.openedLocked()
	}
	switch {
	case r.err == nil:
		if !c.log.policy.replay {
			f.seenLocked(began)
		}
		return true
	case r.err == errSuspended, errors.Is(r.err, errUnknownToken):
		return false
	}
	return len(run) > 0 && slices.ContainsFunc(f.cursors, func(other *cursor) bool {
		if other == c {
			return c.behind(run[0].n, !f.page)
		}
		return other.behind(other.sent, false)
	})
}

// openedLocked notes that the stream has opened, with all that was buffered.
func (f *follower) openedLocked() {
	f.buffered, f.since = false, time.Now()
	for _, c := range f.cursors {
		c.settle(nil, 0, true)
	}
}

// An event that the gateway buffers until its stream is open is lost with that stream if the client leaves first.
// Whether it opened is asked a few times, for as long as a connect callback may take.
const (
	openLimit = 5 * time.Second
	openPause = 20 * time.Millisecond
)

// awaitOpen finds out whether buffered events are with the browser now. It returns false at once if there are none, or
// if nobody needs to know.
func (f *follower) awaitOpen() bool {
	f.mu.Lock()
	mayLose := slices.ContainsFunc(f.cursors, func(c *cursor) bool { return !c.log.policy.replay })
	waiting := f.buffered && !f.stopped && !f.asked && mayLose
	f.mu.Unlock()
	if !waiting {
		return false
	}
	r := sendResult{buffered: true}
	for tries := openLimit / openPause; tries > 0 && f.conns.current(f.identifier, f.token) != nil; tries-- {
		if f.probes {
			r = f.conns.Probe(f.identifier, f.token)
		} else if f.state.CompareAndSwap(workingAgain, working) {
			return true // the answer to what is new tells, too
		}
		if r.err != nil || !r.buffered {
			break
		}
		time.Sleep(openPause)
	}
	if !f.probes { // it writes an empty event for each probe, and so is asked once, when the stream must be open
		r = f.conns.Probe(f.identifier, f.token)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = true
	if r.err == nil && !r.buffered {
		f.openedLocked()
	}
	return true
}
