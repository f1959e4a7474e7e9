// Page streams: one connection that carries the versions for a request_id and the events of any number of tasks, and
// what TaskService does for them. Tokens are not known here; follower.go delivers the events of all logs.

package main

import (
	"cmp"
	"slices"
)

// maxPageTasks is how many tasks a page stream may follow.
const maxPageTasks = 50

// PageService lets pages follow tasks and versions.
type PageService struct {
	tasks   *TaskService
	version *VersionService
}

var errTooManyTasks = badRequest("too_many_tasks", "a page stream follows at most 50 tasks")

// OnConnect makes a stream follow the versions for a request_id, and tasks. An unknown task is told to the page as an
// error event; its events follow if it is made while the page is connected.
func (p *PageService) OnConnect(id string, c connectRequest) (open event, end bool, err error) {
	taskIDs := slices.Compact(slices.Sorted(slices.Values(c.taskIDs)))
	switch {
	case slices.ContainsFunc(taskIDs, func(id string) bool { return checkID(id) != nil }):
		return event{}, false, errBadID
	case len(taskIDs) > maxPageTasks:
		return event{}, false, errTooManyTasks
	case p.tasks.crowded(taskIDs), p.version.crowded(id):
		return event{}, false, errNoRoom
	}
	f := &follower{identifier: servicePage + ":" + id, onEnd: func() { p.tasks.unwatch(taskIDs) }}
	return f.connect(p.tasks.conns, c, func(follow func(*eventLog)) {
		p.tasks.watch(taskIDs, follow)
		follow(p.version.follow(id))
	})
}

// maxFollowers is how many connections may follow one task, or wait for it to be made. As it is looked at before the
// connection is made, a few more may come to do so.
const maxFollowers = 10_000

// crowded reports whether one of the tasks has as many followers as it may.
func (s *TaskService) crowded(ids []string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(ids, func(id string) bool {
		events := s.awaited[id]
		if t := s.tasks[id]; t != nil {
			events = t.events
		}
		return events != nil && events.stats().followers >= maxFollowers
	})
}

// watch has a page follow a log with an error event for each unknown task, and the logs of all tasks: an unknown one
// gets the log for when it is made, until unwatch.
func (s *TaskService) watch(ids []string, follow func(*eventLog)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	unknown := newEventLog(s.unknown)
	follow(unknown)
	for _, id := range ids {
		if t := s.tasks[id]; t != nil {
			follow(t.events)
			continue
		}
		unknown.Publish(unknown.Add(entry{data: taskNotFound(id), keep: true}), "")
		s.awaited[id] = cmp.Or(s.awaited[id], newEventLog(s.policy))
		follow(s.awaited[id])
	}
}

// unwatch is called when a page with these tasks has ended.
func (s *TaskService) unwatch(ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if events := s.awaited[id]; events != nil && events.stats().followers == 0 {
			delete(s.awaited, id)
		}
	}
}
