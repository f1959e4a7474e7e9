// ConnectionManager: which token is the current connection of which identifier, and
// send and close by identifier. Tasks and versions are not known here; what must be
// delivered is in outbox.go, the way to the gateway in gateway.go.

package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// connectionMetrics is what the ConnectionManager tells of its work.
type connectionMetrics interface {
	RecordSSEGatewayConnection(service, action string)
	RecordSSEGatewayEvent(service, status string)
	RecordSSEGatewaySendDuration(service string, seconds float64)
}

// sender is the gateway as the ConnectionManager sees it; see gatewayClient.
type sender interface {
	send(token string, events []event, end bool) sendResult
}

// ConnectionManager knows which token is the current connection of each
// identifier. It makes no promise about what was delivered; outboxes do.
type ConnectionManager struct {
	gateway sender
	log     *slog.Logger
	met     connectionMetrics
	active  atomic.Int64 // goroutines of background

	// mu guards the maps; under it there is map work only. Whenever it is free,
	// connections[id].token == t if and only if tokens[t] == id.
	mu          sync.Mutex
	connections map[string]*connection // by identifier
	tokens      map[string]string      // identifier by token

	// replaced has the identifiers of streams that could not be told of their
	// end, by token. What is beyond maxReplaced is left to the client.
	replaced map[string]string
}

const maxReplaced = 10000

// connection is the one current connection of an identifier.
type connection struct {
	token   string
	url     string    // request target of the stream
	since   time.Time // when it connected
	checked time.Time // when it connected, or a sweep last asked for it
	suspect bool      // a send failed: the client may have a gap, so the stream must end
}

func newConnectionManager(gateway sender, log *slog.Logger, met connectionMetrics) *ConnectionManager {
	return &ConnectionManager{
		gateway:     gateway,
		log:         log,
		met:         met,
		connections: map[string]*connection{},
		tokens:      map[string]string{},
		replaced:    map[string]string{},
	}
}

// OnConnect makes token the connection of identifier. It returns the token
// that this replaces, or "", which the caller gives to CloseReplaced.
func (m *ConnectionManager) OnConnect(identifier, token, url string) (replaced string) {
	now := time.Now()
	m.mu.Lock()
	if other, ok := m.tokens[token]; ok && other != identifier {
		delete(m.connections, other)
	}
	if c, ok := m.connections[identifier]; ok && c.token != token {
		replaced = c.token
		delete(m.tokens, replaced)
	}
	m.connections[identifier] = &connection{token: token, url: url, since: now, checked: now}
	m.tokens[token] = identifier
	m.mu.Unlock()
	m.met.RecordSSEGatewayConnection(serviceOf(identifier), "connect")
	return replaced
}

// CloseReplaced tells a replaced stream that it is at its end. It returns at
// once. If the gateway does not answer, the next sweep tries again: nobody
// else knows of that stream any more.
func (m *ConnectionManager) CloseReplaced(identifier, token string) {
	m.background(func() {
		r := m.send(identifier, token, []event{closeEvent("replaced")}, true)
		if r.err == nil || errors.Is(r.err, errUnknownToken) {
			return
		}
		m.log.Warn("closing a replaced stream", "identifier", identifier, "token", mask(token), "err", r.err)
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.replaced) < maxReplaced {
			m.replaced[token] = identifier
		}
	})
}

// OnDisconnect removes the connection of token. A token that is unknown, or
// no longer the current one, removes nothing.
func (m *ConnectionManager) OnDisconnect(token string) {
	m.mu.Lock()
	identifier := m.tokens[token]
	c := m.connections[identifier]
	removed := m.removeLocked(identifier, token)
	m.mu.Unlock()
	if !removed {
		m.log.Debug("ignoring a stale disconnect", "token", mask(token))
		return
	}
	m.met.RecordSSEGatewayConnection(serviceOf(identifier), "disconnect")
	m.log.Debug("disconnected", "identifier", identifier, "url", c.url, "after", time.Since(c.since))
}

// remove removes the connection of identifier if it is still that of token.
func (m *ConnectionManager) remove(identifier, token string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.removeLocked(identifier, token)
}

func (m *ConnectionManager) removeLocked(identifier, token string) bool {
	if c := m.connections[identifier]; c == nil || c.token != token {
		return false
	}
	delete(m.connections, identifier)
	delete(m.tokens, token)
	return true
}

// Connected reports whether identifier has a connection.
func (m *ConnectionManager) Connected(identifier string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.connections[identifier]
	return ok
}

// Active counts the connections of each service.
func (m *ConnectionManager) Active() map[string]float64 {
	n := map[string]float64{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for identifier := range m.connections {
		n[serviceOf(identifier)]++
	}
	return n
}

// delivery is what became of an event.
type delivery int

const (
	delivered    delivery = iota
	heldBack              // the gateway took it, but its stream is not open yet
	disconnected          // the token is not, or no longer, the connection
	failed                // it is unknown whether the gateway took it
	suspended             // not tried: an earlier event failed, and the stream is being ended for it
)

// Send gives events to the connection of identifier, if that is still token,
// or only the first ones: it returns how many were taken, and what became of
// the last of those or, if there is none, of the first event. If end is set,
// there is one event, after which the stream ends. Nothing is tried twice.
// After a failure the client may lack an event, or have it; from then on Send
// only tries to end the stream, so that the browser comes back and resumes by
// ID.
func (m *ConnectionManager) Send(identifier, token string, events []event, end bool) (taken int, result delivery) {
	m.mu.Lock()
	c := m.connections[identifier]
	current := c != nil && c.token == token
	suspect := current && c.suspect
	m.mu.Unlock()
	if !current {
		return 0, disconnected
	}
	if suspect {
		m.endSuspect(identifier, token)
		return 0, suspended
	}
	r := m.send(identifier, token, events, end)
	if errors.Is(r.err, errUnknownToken) {
		m.remove(identifier, token)
	} else if r.err != nil {
		m.log.Error("sending an event", "identifier", identifier, "token", mask(token), "err", r.err)
		m.suspect(identifier, token)
	}
	if r.taken > 0 {
		r.err = nil // the next Send says so
	}
	return r.taken, r.delivery()
}

// send posts events and records how it went.
func (m *ConnectionManager) send(identifier, token string, events []event, end bool) sendResult {
	start := time.Now()
	r := m.gateway.send(token, events, end)
	service := serviceOf(identifier)
	m.met.RecordSSEGatewaySendDuration(service, time.Since(start).Seconds())
	for range r.taken {
		m.met.RecordSSEGatewayEvent(service, "success")
	}
	if r.err != nil {
		m.met.RecordSSEGatewayEvent(service, "error")
	}
	return r
}

// Probe reports whether the gateway has opened the stream of token: delivered,
// heldBack, disconnected, or failed when it did not say.
func (m *ConnectionManager) Probe(identifier, token string) delivery {
	r := m.gateway.send(token, nil, false)
	if errors.Is(r.err, errUnknownToken) {
		m.remove(identifier, token)
	}
	return r.delivery()
}

func (r sendResult) delivery() delivery {
	switch {
	case errors.Is(r.err, errUnknownToken):
		return disconnected
	case r.err != nil:
		return failed
	case r.buffered:
		return heldBack
	}
	return delivered
}

// endSuspect ends a stream that may have a gap. The gateway's disconnect
// callback, or its 404, then removes the connection.
func (m *ConnectionManager) endSuspect(identifier, token string) {
	r := m.gateway.send(token, nil, true)
	if errors.Is(r.err, errUnknownToken) {
		m.remove(identifier, token)
	} else if r.err != nil {
		m.log.Debug("ending a stream that may have a gap", "identifier", identifier, "token", mask(token), "err", r.err)
	}
}

// suspect marks the connection of identifier if it is still that of token.
func (m *ConnectionManager) suspect(identifier, token string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.connections[identifier]; c != nil && c.token == token {
		c.suspect = true
	}
}

// sweepers is how many connections a sweep asks for at the same time.
const sweepers = 8

// Sweep asks the gateway, until ctx ends, for every connection about once an
// interval: what it does not know any more, after a crash without disconnect
// callbacks, is removed. It runs several times an interval, which spreads the
// checks.
func (m *ConnectionManager) Sweep(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(max(interval/8, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			m.sweep(interval)
		}
	}
}

func (m *ConnectionManager) sweep(interval time.Duration) {
	type check struct {
		identifier, token string
		suspect           bool
	}
	var due []check
	now := time.Now()
	m.mu.Lock()
	for identifier, c := range m.connections {
		if now.Sub(c.checked) >= interval {
			c.checked = now
			due = append(due, check{identifier, c.token, c.suspect})
		}
	}
	replaced := m.replaced
	m.replaced = map[string]string{}
	m.mu.Unlock()
	for token, identifier := range replaced {
		m.CloseReplaced(identifier, token)
	}

	checks := make(chan check)
	var workers sync.WaitGroup
	for range min(sweepers, len(due)) {
		workers.Go(func() {
			for c := range checks {
				if c.suspect {
					m.endSuspect(c.identifier, c.token)
				} else {
					m.Probe(c.identifier, c.token)
				}
			}
		})
	}
	for _, c := range due {
		checks <- c
	}
	close(checks)
	workers.Wait()
}

// background runs f in a goroutine that Drain waits for.
func (m *ConnectionManager) background(f func()) {
	m.active.Add(1)
	go func() {
		defer m.active.Add(-1)
		f()
	}()
}

// Drain waits until no send is under way, or until ctx ends.
func (m *ConnectionManager) Drain(ctx context.Context) {
	for m.active.Load() > 0 {
		select {
		case <-ctx.Done():
			m.log.Warn("ending with sends under way", "count", m.active.Load())
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// EndAll ends every stream, without the event that would keep its browser
// from coming back: to the backend that takes this one's place.
func (m *ConnectionManager) EndAll(ctx context.Context) {
	m.mu.Lock()
	tokens := slices.Collect(maps.Keys(m.tokens))
	m.mu.Unlock()
	for _, token := range tokens {
		m.background(func() { m.gateway.send(token, nil, true) })
	}
	m.Drain(ctx)
}
