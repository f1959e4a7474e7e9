// VersionService: versions that are pending for a request_id, announced to everybody, or polled, and its handler.
// Tokens are not known here; follower.go delivers the events.

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

const (
	maxVersionBody = 64 << 10 // bytes of a request body, and of a polled version.json
	maxVersion     = 256      // bytes of a version
	maxChangelog   = 32 << 10 // bytes of a changelog

	// maxVersionHeld bounds the memory of all request IDs, in bytes. Each takes versionOverhead, and with a connection
	// connectedOverhead more. From half of it on, tidy drops what was delivered. When it is reached, new request IDs
	// are refused, and so are announcements to a single one.
	maxVersionHeld    = 256 << 20
	versionOverhead   = 265
	connectedOverhead = 520
	// tidyInterval is the longest time between two runs of tidy.
	tidyInterval = 10 * time.Second

	pollLimit = 10 * time.Second
	pollAgain = time.Second // between the first two polls: a version must be seen twice to count
	// announceLimit bounds how long an announcement waits for its delivery.
	announceLimit = 10 * time.Second
)

// VersionService tells browsers about new versions of the frontend: the one with a request_id, which may connect later,
// or all of them.
//
// Lock order: mu, then that of an event log.
type VersionService struct {
	cfg     versionConfig
	conns   *ConnectionManager
	log     *slog.Logger
	met     *backendMetrics
	policy  *logPolicy // of the logs
	journal *journal

	mu         sync.Mutex                // guards the rest
	streams    map[string]*versionStream // by request_id
	memory     budget                    // of the streams
	latest     announcement              // the last one to everybody
	broadcasts uint32                    // how many there were to everybody
}

// versionStream is one request_id.
type versionStream struct {
	events      *eventLog
	stored      bool      // there was an announcement to it alone, so it is in the journal
	broadcast   uint32    // the last announcement to everybody that it has, or needs not have
	storedStart uint64    // start of its log as last written to the journal
	version     string    // of its last event
	alone       time.Time // since when it has no connection; zero while it has one
	held        share     // as last counted in the service's memory
}

// announcement is a version, and the data of its event.
type announcement struct {
	version string
	data    string
}

var (
	errBadVersion   = badRequest("bad_version", fmt.Sprintf("version must be a string of 1 to %d bytes", maxVersion))
	errBadChangelog = badRequest("bad_changelog", fmt.Sprintf("changelog must be a string of at most %d bytes", maxChangelog))
	errVersionEvent = newError(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("version and changelog have more than %d bytes in JSON", maxEventData))
)

func newVersionService(cfg versionConfig, conns *ConnectionManager, log *slog.Logger, met *backendMetrics) *VersionService {
	return &VersionService{
		cfg:   cfg,
		conns: conns,
		log:   log,
		met:   met,
		policy: &logPolicy{
			event:   "version",
			epoch:   newEpoch,
			limit:   cfg.pendingLimit,
			dropped: met.dropped.with(serviceVersion, "limit"),
		},
		streams: map[string]*versionStream{},
		memory:  budget{limit: maxVersionHeld},
	}
}

// OnConnect makes a stream follow the versions for a request_id: first those that are pending for it, then the last one
// announced to everybody, if that is missing.
func (s *VersionService) OnConnect(id string, c connectRequest) (open event, end bool, err error) {
	if s.crowded(id) {
		return event{}, false, errNoRoom
	}
	f := &follower{identifier: serviceVersion + ":" + id}
	return f.connect(s.conns, c, func(follow func(*eventLog)) { follow(s.follow(id)) })
}

// crowded reports whether there is no room for a connection of a request_id. As it is looked at before the connection is
// made, a few more may come to be made.
func (s *VersionService) crowded(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams[id] == nil && !s.memory.fits(versionOverhead+2*len(id))
}

// follow returns the log of a request_id, with the last announcement to everybody. Its connection must have been made:
// otherwise an announcement to everybody might not see it, and tidy might forget the log.
func (s *VersionService) follow(id string) *eventLog {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streamLocked(id)
	st.alone = time.Time{}
	s.catchUpLocked(id, st)
	s.countLocked(id, st)
	return st.events
}

// connected reports whether a request_id has a stream, of its own or of a page.
func (s *VersionService) connected(id string) bool {
	return s.conns.Connected(serviceVersion+":"+id) || s.conns.Connected(servicePage+":"+id)
}

// streamLocked returns the stream of a request_id, and makes it if there is none. The caller counts what it holds then.
func (s *VersionService) streamLocked(id string) *versionStream {
	st := s.streams[id]
	if st == nil {
		st = &versionStream{events: newEventLog(s.policy), alone: time.Now()}
		s.streams[id] = st
	}
	return st
}

// countLocked counts what st holds now.
func (s *VersionService) countLocked(id string, st *versionStream) {
	stats := st.events.stats()
	n := versionOverhead + 2*len(id) + len(st.version) + stats.held
	if st.alone.IsZero() {
		n += connectedOverhead
	}
	s.memory.count(&st.held, share{n, stats.kept})
}

// catchUpLocked appends the last announcement to everybody, unless st has it, or the same version as its last one. It
// returns the event's number, or 0.
func (s *VersionService) catchUpLocked(id string, st *versionStream) (n uint64) {
	if st.broadcast == s.broadcasts || st.version == s.latest.version {
		st.broadcast = s.broadcasts
		return 0
	}
	return s.appendLocked(id, st, s.latest.version, entry{data: s.latest.data, shared: true})
}

// appendLocked appends an event. It is published once it, and all that was written before it, is on disk.
func (s *VersionService) appendLocked(id string, st *versionStream, version string, e entry) (n uint64) {
	st.version, st.broadcast = version, s.broadcasts
	n = st.events.Add(e)
	var record []byte
	if st.stored {
		e.n = n
		record = st.record(id, e)
	}
	s.journal.write(record, func() { st.events.Publish(n, "") })
	s.countLocked(id, st)
	return n
}

func (a announcement) record() []byte {
	return encodeRecord(recordLatest, recordFields{Version: a.version, Data: a.data})
}

// records returns those of a request_id: the events that are kept, and how many of them have been received.
func (st *versionStream) records(id string) (records [][]byte) {
	for _, e := range st.events.All() {
		e.shared = false
		records = append(records, st.record(id, e))
	}
	return append(records, encodeRecord(recordMark, recordFields{ID: id, Event: st.events.stats().start}))
}

// record returns the record of an event.
func (st *versionStream) record(id string, e entry) []byte {
	r := recordFields{ID: id, Epoch: st.events.epoch, Version: st.version, Event: e.n, Data: e.data, Shared: e.shared}
	if e.shared { // it is that of the last announcement to everybody
		r.Data = ""
	}
	return encodeRecord(recordVersion, r)
}

// Tell announces a version to one request_id, which gets it when it connects if it is not connected. It does not wait
// for the delivery, but returns the number of the event in its log.
func (s *VersionService) Tell(id string, a announcement) (told map[*eventLog]uint64, stored *commit, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.memory.fits(versionOverhead + 2*len(id) + heapSize(len(a.data)) + entrySize) {
		return nil, nil, errNoRoom
	}
	st := s.streamLocked(id)
	if s.journal != nil && !st.stored { // from now on it is in the journal
		st.stored = true
		for _, record := range st.records(id) {
			s.journal.write(record)
		}
	}
	if a.version != s.latest.version { // or a is what st lacks
		s.catchUpLocked(id, st)
	}
	n := s.appendLocked(id, st, a.version, entry{data: a.data})
	return map[*eventLog]uint64{st.events: n}, s.journal.written(), nil
}

// TellAll announces a version to everybody: to those that are connected, unless it is their last one, and to all that
// connect later. It does not wait for the deliveries, but returns the number of the event in each log.
func (s *VersionService) TellAll(a announcement) (told map[*eventLog]uint64, stored *commit) {
	told = map[*eventLog]uint64{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.latest = a
	s.broadcasts++
	s.journal.write(a.record())
	for id, st := range s.streams {
		if s.connected(id) {
			if n := s.catchUpLocked(id, st); n != 0 {
				told[st.events] = n
			}
		}
	}
	return told, s.journal.written()
}

// Tidy drops, until ctx ends, the logs that have had no connection for the configured time, and notes in the journal
// what was received. While memory is short it also drops what no fresh connection would get.
func (s *VersionService) Tidy(ctx context.Context) {
	every(ctx, min(tidyInterval, s.cfg.pendingTTL/8), s.tidy)
}

func (s *VersionService) tidy() {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	short := int(s.memory.bytes.Load()) > s.memory.limit/2
	for id, st := range s.streams {
		if short {
			st.events.Shed()
		}
		stats := st.events.stats()
		if st.stored && st.storedStart != stats.start { // late is good enough: it is given again
			st.storedStart = stats.start
			s.journal.write(encodeRecord(recordMark, recordFields{ID: id, Event: stats.start}))
		}
		if s.connected(id) {
			st.alone = time.Time{}
		} else if st.alone.IsZero() {
			st.alone = now
		}
		forgettable := short && stats.bytes == 0 // a new log would begin with the same announcement
		if !st.alone.IsZero() && (now.Sub(st.alone) >= s.cfg.pendingTTL || forgettable) {
			delete(s.streams, id)
			if st.stored {
				s.journal.write(encodeRecord(recordDropID, recordFields{ID: id}))
			}
			s.memory.count(&st.held, share{})
			s.met.dropped.with(serviceVersion, "expired").Add(stats.waiting)
			continue
		}
		s.countLocked(id, st)
	}
}

// Poll polls a version.json until ctx ends. A version that it sees twice in a row is announced to everybody, unless it
// is the last one that was; once is not enough, as in a rolling deployment old and new servers answer by turns. The
// first one is announced, too: it may have been deployed while nobody polled. A failure is logged when it begins and
// when it is over.
func (s *VersionService) Poll(ctx context.Context, target string, interval time.Duration) {
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, DialContext: dial, TLSHandshakeTimeout: dialLimit}
	client := &http.Client{Timeout: pollLimit, Transport: transport}
	seen, failing := "", false
	for pause := min(interval, pollAgain); ; pause = interval {
		a, err := fetchVersion(ctx, client, target)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && !failing:
			s.log.Error("polling the frontend version", "err", err)
		case err == nil && failing:
			s.log.Info("polling the frontend version works again")
		}
		failing = err != nil
		if !failing && a.version == seen && a.version != s.Latest() {
			s.log.Info("new frontend version", "version", a.version)
			s.TellAll(a) // and do not wait: a gateway that hangs must not delay the next poll
		}
		seen = cmp.Or(a.version, seen) // after a failure there is none
		sleep(ctx, pause)
	}
}

// Latest returns the version that was last announced to everybody, or "".
func (s *VersionService) Latest() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.latest.version
}

// fetchVersion gets and reads a version.json. The request is not conditional: validators made of date and size miss
// deployments.
func fetchVersion(ctx context.Context, client *http.Client, target string) (a announcement, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return a, withoutSecrets(err)
	}
	req.Header.Set("Accept", jsonType)
	req.Header.Set("Cache-Control", "no-cache")
	resp, err := client.Do(req)
	if err != nil {
		return a, withoutSecrets(err)
	}
	body, err := readAnswer(resp, maxVersionBody+1)
	switch {
	case err != nil:
		return a, err
	case resp.StatusCode != http.StatusOK:
		return a, fmt.Errorf("fetching the version: status %d", resp.StatusCode)
	case len(body) > maxVersionBody:
		return a, fmt.Errorf("fetching the version: more than %d bytes", maxVersionBody)
	}
	o, bad := parseObject(bytes.TrimPrefix(body, []byte("\ufeff")))
	a, err = parsePolled(o)
	if err := cmp.Or(bad, err); err != nil {
		return a, fmt.Errorf("reading the version: %w", err)
	}
	return a, nil
}

// parsePolled is parseAnnouncement for a file that a build made: a number is taken as its text, and a changelog that
// cannot be used is left out.
func parsePolled(o object) (announcement, error) {
	if _, err := parseNumber(o["version"]); err == nil {
		o["version"] = marshal(string(o["version"]))
	}
	a, err := parseAnnouncement(o)
	if err != nil {
		delete(o, "changelog")
		a, err = parseAnnouncement(o)
	}
	return a, err
}

// parseAnnouncement reads {"version":"…","changelog":"…"}.
func parseAnnouncement(o object) (a announcement, err error) {
	version, _, err := o.str("version")
	if err != nil || version == "" || len(version) > maxVersion {
		return a, errBadVersion
	}
	changelog, _, err := o.str("changelog")
	if err != nil || len(changelog) > maxChangelog {
		return a, errBadChangelog
	}
	data := marshal(struct {
		Version   string `json:"version"`
		Changelog string `json:"changelog,omitempty"`
	}{version, changelog})
	if len(data) > maxEventData {
		return a, errVersionEvent
	}
	return announcement{version, string(data)}, nil
}

// serveAnnounce is POST /api/deployments/version.
func (s *VersionService) serveAnnounce(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxVersionBody)
	a, bad := parseAnnouncement(body)
	if err := cmp.Or(err, bad); err != nil {
		return 0, nil, err
	}
	id, single, err := body.str("request_id")
	if err != nil || single && checkID(id) != nil {
		return 0, nil, errBadID
	}
	ctx, cancel := context.WithTimeout(r.Context(), announceLimit)
	defer cancel()
	var told map[*eventLog]uint64
	var stored *commit
	if single {
		told, stored, err = s.Tell(id, a)
	} else {
		told, stored = s.TellAll(a)
	}
	if err := cmp.Or(err, stored.wait()); err != nil {
		return 0, nil, err
	}
	delivered := 0 // to an open stream, before ctx ended
	for events, n := range told {
		if events.Wait(ctx, n) {
			delivered++
		}
	}
	if !single {
		return http.StatusAccepted, map[string]any{"version": a.version, "delivered": delivered, "failed": len(told) - delivered}, nil
	}
	said := "queued"
	if delivered > 0 {
		said = "delivered"
	}
	return http.StatusAccepted, map[string]any{"requestId": id, "delivered": delivered > 0, "status": said}, nil
}
