// Delivery: a follower gives one connection the events of one or more logs, each once and in the order of its log.
// Tasks and versions are not known here. The events are in eventlog.go, the connection in connmgr.go.

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
// leaves sooner may not have read anything.
const settleTime = time.Second

// follower sends the events of its logs to one connection, which is one token. At most one goroutine sends at a time,
// one run after the other, and nothing is sent twice. Once the connection has been replaced its follower changes no
// position any more, so a send that is still under way cannot affect the new connection.
//
// The ID of an event has the position in every log, so that a browser that comes back resumes in each. Only a follower
// of a single log ends with it.
type follower struct {
	identifier string
	token      string
	conns      *ConnectionManager
	onEnd      func()       // called when the connection has ended, perhaps twice; may be nil
	wakes      atomic.Int32 // 0 when deliver does not run; 1 when it does; more when it must look once more before it ends
	stopped    atomic.Bool  // the connection has ended
	probes     bool         // the gateway can be asked about a stream that is not open yet
	turn       uint32       // of deliver alone: which of the cursors but the first comes next, modulo their number

	mu       sync.Mutex // guards the rest
	cursors  []*cursor  // does not change any more when deliver runs
	since    time.Time  // when the connection was opened, as far as is known
	buffered bool       // changed by deliver alone: the last events wait in the gateway for the stream to open
}

// connect makes the stream of c the connection of f.identifier, in place of any other, and delivers to it the events of
// the logs that choose gives to follow, once the connection is made: those after c.lastEventID, or from where a fresh
// connection starts. It returns the event that begins the stream. If the request is older than that of the present
// connection, this is connection_close, and end is true. The only error is errAskFirst.
func (f *follower) connect(conns *ConnectionManager, c connectRequest, choose func(follow func(*eventLog))) (open event, end bool, err error) {
	f.conns, f.token, f.probes, f.since = conns, c.token, c.probes, time.Now()
	f.wakes.Store(1) // deliver begins below, as the ID of an event needs the positions in all logs
	replaced, err := conns.OnConnect(f.identifier, c, f)
	if err == errOutdated {
		return closeEvent("replaced"), true, nil
	}
	if err != nil {
		return event{}, false, err
	}
	named := parsePositions(c.lastEventID)
	choose(func(events *eventLog) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.cursors = append(f.cursors, events.attach(f, named))
	})
	position := strings.TrimPrefix(f.besides(nil), ".")
	if f.stopped.Load() {
		f.ended(time.Time{}) // again, for what choose did after the first call
	} else {
		conns.spawn(f.deliver)
	}
	if replaced != "" {
		conns.CloseReplaced(f.identifier, replaced)
	}
	return event{ID: position, Name: "connection_open", Data: `{"status":"connected"}`}, false, nil
}

// besides returns the part of an event ID after the one of c: the positions in the other logs, each after a dot.
func (f *follower) besides(c *cursor) string {
	ids := make([]byte, 0, (len(f.cursors)-1)*maxPosition)
	for _, other := range f.cursors {
		if other != c && other.events.epoch != "" {
			ids = other.events.appendID(append(ids, '.'), other.sent)
		}
	}
	return string(ids)
}

// seen notes that the stream was open at that time. If it had been for settleTime, what it was given counts as
// received.
func (f *follower) seen(at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seenLocked(at)
}

func (f *follower) seenLocked(at time.Time) {
	if f.stopped.Load() || f.buffered || at.Sub(f.since) < settleTime {
		return
	}
	for _, c := range f.cursors {
		c.events.Received(c.sent)
	}
}

// ended stops the delivery for good. The connection was there until the given time, or zero if that is not known.
func (f *follower) ended(until time.Time) {
	f.mu.Lock()
	f.seenLocked(until)
	f.stopped.Store(true) // the connection moves no position of a log any more
	for _, c := range f.cursors {
		c.detach()
	}
	f.mu.Unlock()
	if f.onEnd != nil {
		f.onEnd()
	}
}

// wake makes deliver look for what is new. It takes no lock, as logs call it with theirs held.
func (f *follower) wake() {
	if f.wakes.Load() < 2 && f.wakes.Add(1) == 1 { // from 2 on deliver looks once more anyway
		f.conns.spawn(f.deliver)
	}
}

func (f *follower) working() bool { return f.wakes.Load() > 0 }

// rest lets deliver end, unless f has been woken since it last looked. It reports whether it did.
func (f *follower) rest() bool {
	if !f.wakes.CompareAndSwap(1, 0) {
		return false
	}
	for _, c := range f.cursors {
		c.events.notify()
	}
	return true
}

// deliver sends until the connection has everything or has ended, or until a send fails and there is nothing more to
// send.
func (f *follower) deliver() {
	most := 1
	for !f.stopped.Load() { // its token may be current again: a proxy may repeat a callback
		f.wakes.Store(1)
		c, run, reason := f.next(most)
		var events []event
		end := false
		switch {
		case len(run) > 0:
			events = f.events(c, run)
		case reason != "":
			events, end = []event{closeEvent(reason)}, true
		default:
			f.awaitOpen()
			if f.rest() {
				return
			}
			continue
		}
		began := time.Now()
		r := f.conns.Send(f.token, events, end)
		most = max(1, min(2*r.taken, maxRun))
		// After the end wakes stays above 0, and nothing starts deliver again.
		if !f.settle(c, run, r, began) && f.rest() || end && r.err == nil {
			return
		}
	}
}

// next returns the next run. If there is none it returns the reason of the end of the first log: of a page, that log
// has no end. Events of the first go first, as that a task is unknown must be said before its events. The others take
// turns.
func (f *follower) next(most int) (c *cursor, run []entry, reason string) {
	c = f.cursors[0]
	run, reason = c.take(most)
	others := f.cursors[1:]
	for i := 0; i < len(others) && len(run) == 0; i++ {
		c = others[f.turn%uint32(len(others))]
		f.turn++
		run, _ = c.take(most)
	}
	return c, run, reason
}

func (f *follower) events(c *cursor, run []entry) []event {
	others := f.besides(c)
	var id [maxPosition]byte
	var ids strings.Builder // for the whole run
	ids.Grow(len(run) * maxPosition)
	events := make([]event, len(run))
	for i, e := range run {
		events[i] = event{Name: c.events.policy.event, Data: e.data}
		if c.events.epoch != "" {
			start := ids.Len()
			ids.Write(c.events.appendID(id[:0], e.n))
			events[i].ID, events[i].others = ids.String()[start:], others
		}
	}
	return events
}

// settle notes what became of a run whose send began at that time, or of the end, which is an empty run. It reports
// whether deliver should go on. After a failure it should if there is more: the next send then ends the stream, and the
// browser comes back for what it may lack.
func (f *follower) settle(c *cursor, run []entry, r sendResult, began time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	took := r.taken > r.refused // what is refused arrives nowhere, and tells nothing of the stream
	opened := took && f.buffered && !r.buffered
	if took {
		f.buffered = r.buffered
	}
	c.settle(run, min(r.taken, len(run)), took && !f.buffered && !f.stopped.Load())
	if opened { // after c.settle, as it settles every cursor
		f.openedLocked()
	}
	switch {
	case r.err == nil:
		if !c.events.policy.replay {
			f.seenLocked(began)
		}
		return true
	case r.err == errSuspended, errors.Is(r.err, errUnknownToken):
		return false
	}
	return len(run) > 0 && slices.ContainsFunc(f.cursors, func(other *cursor) bool {
		n := other.sent
		if other == c {
			n = run[0].n
		}
		return other.behind(n, len(f.cursors) == 1)
	})
}

// openedLocked notes that the stream has opened, and so was given all that was buffered.
func (f *follower) openedLocked() {
	f.buffered, f.since = false, time.Now()
	for _, c := range f.cursors {
		c.settle(nil, 0, !f.stopped.Load())
	}
}

// An event that the gateway buffers is lost with its stream if the client leaves before the stream opens. Whether it
// opened is asked for as long as a connect callback may take.
const (
	openLimit = 5 * time.Second
	openPause = 20 * time.Millisecond
)

// awaitOpen waits until the stream with the buffered events is known to be open. If nothing is buffered, or no log can
// lose it, it returns at once.
func (f *follower) awaitOpen() {
	mayLose := func(c *cursor) bool { return !c.events.policy.replay }
	if !f.buffered || !slices.ContainsFunc(f.cursors, mayLose) {
		return
	}
	r := sendResult{buffered: true}
	for tries := openLimit / openPause; tries >= 0 && f.conns.current(f.token) != nil; tries-- {
		if f.probes || tries == 0 { // one that writes an empty event for each probe is asked once, when it must be open
			r = f.conns.Probe(f.token, false)
		} else if f.wakes.Load() > 1 {
			return // the answer to the next send tells as well
		}
		if !r.buffered {
			break
		}
		time.Sleep(openPause)
	}
	if r.err == nil && !r.buffered {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.openedLocked()
	}
}
